//! Methods of a policy's sections: each has a name, and fields that only some of its section's methods have.

use std::fmt;

use crate::policy::PolicyError;

/// A method of a section.
pub(crate) trait Method: Copy + 'static {
    /// All of the section.
    const ALL: &'static [Self];
    fn name(self) -> &'static str;
    fn fields(self) -> &'static [&'static str];
}

/// Declares a section's methods: a line each with its name in a policy and the fields that not every method has.
macro_rules! methods {
    (
        $(#[$outer:meta])*
        pub enum $methods:ident {
            $($(#[$doc:meta])* $variant:ident = $name:literal [$($field:literal),*];)*
        }
    ) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $methods {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl $methods {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Its name in a policy.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The fields of its section that are this method's and not every method's.
            #[must_use]
            pub const fn fields(self) -> &'static [&'static str] {
                match self {
                    $(Self::$variant => &[$($field),*],)*
                }
            }
        }

        impl $crate::methods::Method for $methods {
            const ALL: &'static [Self] = Self::ALL;
            fn name(self) -> &'static str {
                self.name()
            }
            fn fields(self) -> &'static [&'static str] {
                self.fields()
            }
        }
    };
}
pub(crate) use methods;

/// Refuses a value of a field that the method does not have. `or` is what else allows it.
pub(crate) fn own<M: Method, T: fmt::Display>(
    method: M,
    (section, field): (&str, &str),
    given: Option<T>,
    or: &str,
) -> Result<Option<T>, PolicyError> {
    match given {
        Some(given) if !method.fields().contains(&field) => {
            let with = M::ALL.iter().filter(|m| m.fields().contains(&field));
            let with: Vec<&str> = with.map(|method| method.name()).collect();
            let allowed = format!("only with method {}{or}", with.join(" or "));
            Err(PolicyError::new(&format!("{section}.{field}"), given, &allowed))
        }
        given => Ok(given),
    }
}
