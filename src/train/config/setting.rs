//! One setting, as the command line sees it.

use std::path::PathBuf;

use toml::Value;

use super::{AspectRatio, Init, Precision, Recompute, Stage, Tune, TuneVision};
use crate::train::sampler::Grouping;
use crate::train::schedule::Decay;

/// A setting of [`Config`](super::Config): a key of its file, and a flag.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Its key; the flag has `-` for `_`.
    pub key: &'static str,
    /// What it is.
    pub help: &'static str,
    /// What to call its value in the help.
    pub value_name: &'static str,
    /// Reads the values that the flag was given, at least one: the last counts, or all of them if there may be several.
    pub parse: fn(&[&str]) -> Result<Value, String>,
}

/// A kind of setting.
pub(super) trait FromFlag {
    /// What to call it in the help.
    const VALUE_NAME: &'static str;

    /// Reads the values of a flag.
    fn parse(values: &[&str]) -> Result<Value, String>;
}

fn last<'a>(values: &[&'a str]) -> &'a str {
    values.last().copied().unwrap_or_default()
}

impl FromFlag for f64 {
    const VALUE_NAME: &'static str = "X";

    fn parse(values: &[&str]) -> Result<Value, String> {
        last(values).parse().map(Value::Float).map_err(|_| format!("`{}` is not a number", last(values)))
    }
}

impl FromFlag for u64 {
    const VALUE_NAME: &'static str = "N";

    fn parse(values: &[&str]) -> Result<Value, String> {
        let number = last(values).parse().ok().filter(|n| *n >= 0);
        number.map(Value::Integer).ok_or_else(|| format!("`{}` is not a whole number from 0 on", last(values)))
    }
}

impl<T: FromFlag> FromFlag for Option<T> {
    const VALUE_NAME: &'static str = T::VALUE_NAME;

    fn parse(values: &[&str]) -> Result<Value, String> {
        T::parse(values)
    }
}

/// Kinds that TOML has as words: what they mean is checked with the file's.
macro_rules! words {
    ($($type:ty, $name:literal;)+) => {
        $(impl FromFlag for $type {
            const VALUE_NAME: &'static str = $name;

            fn parse(values: &[&str]) -> Result<Value, String> {
                Ok(Value::String(last(values).to_owned()))
            }
        })+
    };
}

words! {
    String, "NAME";
    PathBuf, "PATH";
    Stage, "STAGE";
    Tune, "PART";
    TuneVision, "PART";
    Init, "WHAT";
    Precision, "DTYPE";
    Recompute, "WHICH";
    AspectRatio, "HOW";
    Grouping, "HOW";
    Decay, "COURSE";
}

impl FromFlag for Vec<PathBuf> {
    const VALUE_NAME: &'static str = "PATH";

    fn parse(values: &[&str]) -> Result<Value, String> {
        Ok(Value::Array(values.iter().copied().map(Value::from).collect()))
    }
}

impl FromFlag for Vec<String> {
    const VALUE_NAME: &'static str = "NAME,...";

    fn parse(values: &[&str]) -> Result<Value, String> {
        Ok(Value::Array(values.iter().flat_map(|v| v.split(',')).filter(|word| !word.is_empty()).map(Value::from).collect()))
    }
}

/// A complaint of the `toml` crate without the picture of the place that it may have.
pub(super) fn one_line(e: &toml::de::Error) -> String {
    e.message().split_whitespace().collect::<Vec<_>>().join(" ")
}
