//! Names of the devices that an engine runs on.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The fastest that this build and this machine have.
    #[default]
    Auto,
    /// The processor.
    Cpu,
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "sim" | "cuda" => Err(Error::usage(format!("this build has no `{s}` device: use auto or cpu"))),
            _ if s.starts_with("cuda:") => Err(Error::usage(format!("this build has no `{s}` device: use auto or cpu"))),
            _ => Err(Error::usage(format!("unknown device `{s}`: use auto or cpu"))),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
        })
    }
}
