//! Random numbers that are the same in every run: `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014, figure 16).

/// A stream of numbers of one seed.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// The stream of `seed`.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number under `bound`, which is at least 1. Off from uniform by at most `bound / 2^64`.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        // The product's upper half is under the bound.
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// `count` different numbers under `bound`, in random order; all of them where there are no more.
    pub(super) fn distinct(&mut self, count: usize, bound: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..bound).collect();
        let count = count.min(bound);
        for i in 0..count {
            let other = i + self.below(bound - i);
            all.swap(i, other);
        }
        all.truncate(count);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_stream() {
        // Of seed 1234567, as the reference implementation in C prints it.
        let mut random = Random::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn within_bounds_and_distinct() {
        let mut random = Random::new(1);
        let mut seen = [0; 7];
        for _ in 0..7000 {
            seen[random.below(7)] += 1;
        }
        assert!(seen.iter().all(|&n| (800..1200).contains(&n)), "{seen:?}");
        let mut some = random.distinct(5, 9);
        assert!(some.iter().all(|&n| n < 9));
        some.sort_unstable();
        some.dedup();
        assert_eq!(some.len(), 5);
        assert_eq!(random.distinct(5, 3).len(), 3);
    }
}
