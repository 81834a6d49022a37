//! What attention is given, for tests of what is made of it: a policy that hands everything on to another one, and keeps the
//! queries, keys and values of one request.

use std::collections::{BTreeMap, HashMap};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use anyhow::{Context, bail};
use candle_core::{Device, Tensor};
use cinch_hooks::{AttendParams, CachePolicy, DenseAttention, HookError, Qkv, SequenceCache, SequenceInfo};
use cinch_protocol::probe::{Capture, Plan};

/// What a plan asks to capture, if it can be.
///
/// # Errors
/// Another plan than one of a single run, or no layers.
pub fn wanted(plan: &Plan) -> anyhow::Result<Option<&Capture>> {
    let Some(capture) = &plan.capture else {
        return Ok(None);
    };
    let choices: Vec<usize> = plan.groups.iter().flatten().map(|run| run.n).collect();
    if choices != [1] || plan.prefix_cache {
        bail!("capture: given with several runs, n or prefix_cache, allowed for one run of one choice");
    }
    if capture.layers.is_empty() {
        bail!("capture.layers: given none, allowed one or more of the model's");
    }
    Ok(Some(capture))
}

/// Hands everything on, and keeps what one request's layers are given.
pub struct Capturing {
    inner: Arc<dyn CachePolicy>,
    wanted: Capture,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    request: Option<usize>,
    cache: Option<Weak<dyn SequenceCache>>,
    layers: BTreeMap<usize, Given>,
}

/// One layer's steps, (heads, fresh, dim) each.
struct Given {
    params: AttendParams,
    q: Vec<Tensor>,
    k: Vec<Tensor>,
    v: Vec<Tensor>,
}

impl Capturing {
    /// Before a request is [followed](Self::follow) nothing is kept.
    #[must_use]
    pub fn new(inner: Arc<dyn CachePolicy>, wanted: Capture) -> Self {
        Self {
            inner,
            wanted,
            state: Mutex::default(),
        }
    }

    /// Whose rows are kept: a request that is yet to be opened.
    pub fn follow(&self, request: usize) {
        self.state().request = Some(request);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, layer: usize, row: usize, qkv: Qkv<'_>, params: AttendParams) -> candle_core::Result<()> {
        let one = |t: &Tensor| t.get(row)?.force_contiguous();
        let (q, k, v) = (one(qkv.q)?, one(qkv.k)?, one(qkv.v)?);
        let mut state = self.state();
        let given = state.layers.entry(layer).or_insert_with(|| Given {
            params,
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
        });
        given.q.push(q);
        given.k.push(k);
        given.v.push(v);
        Ok(())
    }

    /// Writes what was kept.
    ///
    /// # Errors
    /// Nothing was kept, or the file can't be written.
    pub fn save(&self) -> anyhow::Result<()> {
        let state = self.state();
        let mut tensors = HashMap::new();
        let number = |x: f32| Tensor::new(x, &Device::Cpu);
        for (layer, given) in &state.layers {
            for (side, steps) in [("q", &given.q), ("k", &given.k), ("v", &given.v)] {
                tensors.insert(format!("{side}.{layer}"), Tensor::cat(steps, 1)?);
            }
            tensors.insert(format!("scale.{layer}"), number(given.params.scale)?);
            if let Some(cap) = given.params.softcap {
                tensors.insert(format!("softcap.{layer}"), number(cap)?);
            }
        }
        let Some(first) = state.layers.values().next() else {
            bail!("capture: nothing was attended to");
        };
        let fresh = first.q.iter().map(|q| Ok(u32::try_from(q.dim(1)?)?));
        let fresh = fresh.collect::<anyhow::Result<Vec<u32>>>()?;
        tensors.insert("fresh".into(), Tensor::new(fresh, &Device::Cpu)?);
        let file = &self.wanted.file;
        candle_core::safetensors::save(&tensors, file).with_context(|| format!("writing {}", file.display()))
    }
}

impl CachePolicy for Capturing {
    fn open(&self, sequence: &SequenceInfo) -> Result<Arc<dyn SequenceCache>, HookError> {
        let followed = self.state().request == Some(sequence.request);
        let (layers, last) = (sequence.layers.len(), self.wanted.layers.last());
        if let Some(layer) = last.filter(|layer| followed && **layer >= layers) {
            return Err(HookError::Policy {
                request: sequence.request,
                reason: format!(
                    "capture.layers: given {layer}, allowed 0 to {}",
                    layers.saturating_sub(1)
                ),
            });
        }
        let cache = self.inner.open(sequence)?;
        if followed {
            self.state().cache = Some(Arc::downgrade(&cache));
        }
        Ok(cache)
    }

    fn adopt(
        &self,
        cache: Arc<dyn SequenceCache>,
        sequence: &SequenceInfo,
    ) -> Result<Arc<dyn SequenceCache>, HookError> {
        self.inner.adopt(cache, sequence)
    }

    fn attend(
        &self,
        layer: usize,
        rows: &[Arc<dyn SequenceCache>],
        qkv: Qkv<'_>,
        params: &AttendParams,
        engine: &dyn DenseAttention,
    ) -> Result<Tensor, HookError> {
        if self.wanted.layers.contains(&layer) {
            let own = self.state().cache.clone();
            let row = own.and_then(|own| {
                let mut rows = rows.iter();
                rows.position(|row| ptr::addr_eq(Arc::as_ptr(row), own.as_ptr()))
            });
            if let Some(row) = row {
                self.keep(layer, row, qkv, *params)?;
            }
        }
        self.inner.attend(layer, rows, qkv, params, engine)
    }

    fn prefix_cache_limit(&self) -> usize {
        self.inner.prefix_cache_limit()
    }

    fn prefix_cache_report(&self, entries: usize, bytes: usize, lookup_hit: Option<bool>) {
        self.inner.prefix_cache_report(entries, bytes, lookup_hit);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use cinch_cache::{Assignment, Plugin, PluginSettings};
    use cinch_hooks::LayerShape;

    use super::*;

    fn plan(json: &str) -> Plan {
        serde_json::from_str(json).expect("a plan")
    }

    fn capturing(file: &std::path::Path) -> Capturing {
        let default = Assignment {
            class: "default".into(),
            level: None,
            policy: serde_json::from_str(r#"{"store": "exact"}"#).expect("a policy"),
            own: false,
        };
        let plugin = Plugin::new(PluginSettings::default(), default).expect("a plugin");
        let wanted = Capture {
            file: file.to_owned(),
            layers: [1].into(),
        };
        Capturing::new(plugin, wanted)
    }

    fn info(request: usize, layers: usize) -> SequenceInfo {
        let shape = LayerShape {
            kv_heads: 2,
            k_dim: 16,
            v_dim: 8,
        };
        SequenceInfo {
            request,
            sequence: request,
            choice: 0,
            prompt_tokens: 5,
            context: 64,
            layers: vec![shape; layers],
            dtype: DType::F32,
            device: Device::Cpu,
        }
    }

    #[test]
    fn one_run_of_one_choice_can_be_captured() {
        let run = r#"{"name": "a", "text": "x", "max_tokens": 1}"#;
        let capture = |layers: &str| format!(r#""capture": {{"file": "f", "layers": {layers}}}"#);
        let of = |rest: &str| {
            let plan = plan(&format!("{{{rest}}}"));
            wanted(&plan)
                .map(|found| found.is_some())
                .map_err(|err| err.to_string())
        };
        assert_eq!(of(&format!(r#""groups": [[{run}]]"#)), Ok(false));
        let [one, none] = ["[0]", "[]"].map(capture);
        assert_eq!(of(&format!(r#""groups": [[{run}]], {one}"#)), Ok(true));
        for rest in [
            format!(r#""groups": [], {one}"#),
            format!(r#""groups": [[{run}], [{run}]], {one}"#),
            format!(r#""groups": [[{{"name": "a", "max_tokens": 1, "n": 2}}]], {one}"#),
            format!(r#""groups": [[{run}]], "prefix_cache": true, {one}"#),
        ] {
            let told = of(&rest).expect_err("refused");
            assert!(told.ends_with("allowed for one run of one choice"), "{told}");
        }
        let told = of(&format!(r#""groups": [[{run}]], {none}"#)).expect_err("refused");
        assert!(told.starts_with("capture.layers: given none"), "{told}");
    }

    #[test]
    fn layers_that_there_are_not_are_told() {
        let capturing = capturing(std::path::Path::new("unused"));
        assert!(capturing.open(&info(1, 1)).is_ok(), "a self-test");
        capturing.follow(2);
        let told = capturing.open(&info(2, 1)).err().expect("refused").to_string();
        assert_eq!(
            told,
            "policy of request 2: capture.layers: given 1, allowed 0 to 0"
        );
        let told = capturing.save().expect_err("refused").to_string();
        assert_eq!(told, "capture: nothing was attended to");
    }

    /// Of a batch's second row, in the middle layer: a chunk and two decoded tokens.
    #[test]
    fn what_a_request_is_given_is_what_the_file_has() -> anyhow::Result<()> {
        let file = std::env::temp_dir().join(format!("cinch-capture-{}.safetensors", std::process::id()));
        let capturing = capturing(&file);
        capturing.follow(8);
        let rows = [capturing.open(&info(7, 3))?, capturing.open(&info(8, 3))?];
        let params = AttendParams {
            scale: 0.25,
            softcap: None,
        };
        let mut expected = Vec::new();
        for fresh in [5, 1, 1] {
            for layer in 0..3 {
                let of = |heads: usize, dim: usize| {
                    Tensor::randn(0.0_f32, 1.0, (2, fresh, heads, dim), &Device::Cpu)?.transpose(1, 2)
                };
                let (q, k, v) = (of(4, 16)?, of(2, 16)?, of(2, 8)?);
                let dense = |q: &Tensor, _: &Tensor, _: &Tensor| q.narrow(3, 0, 8);
                let qkv = Qkv { q: &q, k: &k, v: &v };
                let out = capturing.attend(layer, &rows, qkv, &params, &dense)?;
                assert_eq!(out.dims(), [2, 4, fresh, 8]);
                if layer == 1 {
                    expected.push([q.get(1)?, k.get(1)?, v.get(1)?]);
                }
            }
        }
        capturing.save()?;
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
        std::fs::remove_file(&file)?;
        let mut names: Vec<&String> = tensors.keys().collect();
        names.sort();
        assert_eq!(names, ["fresh", "k.1", "q.1", "scale.1", "v.1"]);
        assert_eq!(tensors["fresh"].to_vec1::<u32>()?, [5, 1, 1]);
        assert_eq!(
            tensors["scale.1"].to_scalar::<f32>()?.to_bits(),
            0.25_f32.to_bits()
        );
        for (side, name) in ["q.1", "k.1", "v.1"].into_iter().enumerate() {
            let steps: Vec<&Tensor> = expected.iter().map(|step| &step[side]).collect();
            let right = Tensor::cat(&steps, 1)?.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(tensors[name].flatten_all()?.to_vec1::<f32>()?, right);
        }
        Ok(())
    }
}
