//! Reads the keys of a configuration file one by one, each with the range it may have.
//!
//! A configuration comes from outside. Whatever it says is used to compute sizes later on, so a number that is zero, negative, not
//! whole or too large to be meant is refused here, with the name of its key; `null` counts as absent, as it does for HF.

use std::ops::RangeInclusive;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// An object of a configuration file.
#[derive(Clone)]
pub struct Keys<'a> {
    path: &'a Path,
    /// Where in the file it is: empty, or `text_config.`
    prefix: String,
    map: Option<&'a Map<String, Value>>,
    /// Keys that this file has under other names: (key, name in the file).
    renamed: &'static [(&'static str, &'static str)],
}

impl<'a> Keys<'a> {
    /// The outermost object of the file `path`.
    pub fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self::renamed(path, map, &[])
    }

    /// As [`Keys::new`], of a file with names of its own: pairs of a key and its name there. Errors say the latter.
    pub fn renamed(path: &'a Path, map: &'a Map<String, Value>, renamed: &'static [(&'static str, &'static str)]) -> Self {
        Self { path, prefix: String::new(), map: Some(map), renamed }
    }

    /// What the file calls `key`.
    fn name<'k>(&self, key: &'k str) -> &'k str {
        self.renamed.iter().find(|(k, _)| *k == key).map_or(key, |(_, name)| name)
    }

    /// Whether `key` is there and not null.
    pub fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// Whether `key` is there and null: some configurations switch a default off that way.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.is_some_and(|map| map.get(self.name(key)) == Some(&Value::Null))
    }

    /// The value of `key`, unless null.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(self.name(key)).filter(|value| !value.is_null())
    }

    /// The object at `key`; one without keys if it is absent.
    pub fn object(&self, key: &str) -> Result<Keys<'a>> {
        let map = match self.value(key) {
            None => None,
            Some(Value::Object(map)) => Some(map),
            Some(_) => return Err(self.error(key, "an object")),
        };
        Ok(Keys { path: self.path, prefix: format!("{}{}.", self.prefix, self.name(key)), map, renamed: &[] })
    }

    /// The whole number at `key`, if it is there.
    pub fn int(&self, key: &str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_i64().filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(self.error(key, &format!("a whole number from {} to {}", range.start(), range.end()))),
        }
    }

    /// The count at `key`, from 1 to `max`, if it is there.
    pub fn count(&self, key: &str, max: usize) -> Result<Option<usize>> {
        Ok(self.int(key, 1..=max as i64)?.map(|n| n as usize))
    }

    /// The positive finite number at `key`, if it is there.
    pub fn positive(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_f64().map(|x| x as f32).filter(|x| *x > 0.0 && x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(self.error(key, "a positive number")),
        }
    }

    /// The truth value at `key`, if it is there.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.error(key, "true or false")),
        }
    }

    /// The text at `key`, if it is there.
    pub fn str(&self, key: &str) -> Result<Option<&'a str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.error(key, "a string")),
        }
    }

    /// The three numbers at `key`, one per colour channel, if they are there.
    pub fn channels(&self, key: &str) -> Result<Option<[f32; 3]>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let numbers = value.as_array().and_then(|a| a.iter().map(|x| x.as_f64().map(|x| x as f32)).collect::<Option<Vec<_>>>());
        match numbers.and_then(|n| <[f32; 3]>::try_from(n).ok()).filter(|n| n.iter().all(|x| x.is_finite())) {
            Some(channels) => Ok(Some(channels)),
            None => Err(self.error(key, "three numbers")),
        }
    }

    /// An error: the value of `key` is not `expected`.
    pub fn error(&self, key: &str, expected: &str) -> Error {
        let mut got = self.value(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        if got.len() > 60 {
            let cut = got.floor_char_boundary(60);
            got.replace_range(cut.., "...");
        }
        Error::file(self.path, format!("`{}{}` is {got}: expected {expected}", self.prefix, self.name(key)))
    }

    /// An error: this says something well-formed that LLaVA engine cannot do.
    pub fn unsupported(&self, key: &str, why: &str) -> Error {
        let value = self.value(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        let value: String = value.chars().take(60).collect();
        Error::Unsupported(format!("{}: `{}{}` is {value}: {why}", self.path.display(), self.prefix, self.name(key)))
    }
}
