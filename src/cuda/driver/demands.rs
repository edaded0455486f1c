//! What the kernels demand of a GPU and its driver, and what is said where that is missing: the same for a real GPU and a simulated one.

use std::fmt;
use std::str::FromStr;

use crate::cuda::Cuda;
use crate::error::{Error, Result};

/// What embedded kernels are compiled with, and the first driver that takes them.
const CUDA: Version = Version { major: 13, minor: 0 };
const DRIVER_RELEASE: u32 = 580;

/// What the kernels are written for: `cp.async`, bf16 on tensor cores.
const LOWEST_CAPABILITY: Version = Version { major: 8, minor: 0 };

/// A version of CUDA, or a compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// What stands before the point.
    pub major: i32,
    /// What stands behind it.
    pub minor: i32,
}

impl Version {
    /// As `cuDriverGetVersion` counts: 1000 · major + 10 · minor.
    pub fn of_driver(number: i32) -> Self {
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }

    /// Of the first architecture of those that kernels are compiled for, such as `80,90a`.
    fn lowest_of(architectures: &str) -> Option<Self> {
        let numbers = architectures.split(',').filter_map(|a| a.trim().trim_end_matches(char::is_alphabetic).parse().ok());
        numbers.min().map(|n: i32| Self { major: n / 10, minor: n % 10 })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let parts = s.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        parts.map(|(major, minor)| Self { major, minor }).ok_or_else(|| Error::usage(format!("`{s}` is no version such as 8.0")))
    }
}

/// Refuses a driver that cannot load the kernels; `supported` is the latest CUDA that it knows.
pub fn check_driver(supported: Version) -> Result<()> {
    if supported >= CUDA {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "the NVIDIA driver supports CUDA {supported}, the kernels need {CUDA}: update it to release {DRIVER_RELEASE} or later, or run \
         with --device cpu"
    )))
}

/// Refuses a GPU that the kernels of this build were not compiled for.
pub fn check_capability(gpu: &str, capability: Version) -> Result<()> {
    let lowest = Cuda::architectures().and_then(Version::lowest_of).map_or(LOWEST_CAPABILITY, |v| v.max(LOWEST_CAPABILITY));
    if capability >= lowest {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "{gpu} has compute capability {capability}, the kernels of this build need {lowest} or later: take a newer GPU, or run with \
         --device cpu"
    )))
}

/// What `op` is told when a kernel that was launched before it went wrong while it ran. The driver does not say which one.
pub fn crashed(op: &str, problem: impl fmt::Display) -> Error {
    Error::device(
        op,
        format!(
            "{problem}, in a kernel that was launched before; this process can use the device no more (--check-nan waits for each op, and \
             names the one)"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(s: &str) -> Version {
        s.parse().unwrap()
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(version("9.10") > version("9.9") && version("10.0") > version("9.10"));
        assert_eq!(Version::of_driver(12080), version("12.8"));
        assert_eq!(Version::of_driver(13000), version("13.0"));
        for wrong in ["", "8", "8.", ".8", "8.0.1", "a.b"] {
            assert!(wrong.parse::<Version>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_driver_that_is_too_old_is_refused_with_both_versions() {
        check_driver(version("13.0")).unwrap();
        check_driver(version("13.2")).unwrap();
        let message = check_driver(version("12.9")).unwrap_err().to_string();
        assert!(["12.9", "13.0", "580", "--device cpu"].iter().all(|word| message.contains(word)), "{message}");
    }

    #[test]
    fn the_lowest_capability_is_that_of_the_build() {
        for (architectures, lowest) in [("80,90a", "8.0"), ("90a, 86", "8.6"), ("100a", "10.0")] {
            assert_eq!(Version::lowest_of(architectures), Some(version(lowest)));
        }
        assert_eq!(Version::lowest_of("native"), None);
        check_capability("A GPU", version("12.0")).unwrap();
        let message = check_capability("Tesla T4", version("7.5")).unwrap_err().to_string();
        assert!(["Tesla T4", "7.5", "--device cpu"].iter().all(|word| message.contains(word)), "{message}");
    }
}
