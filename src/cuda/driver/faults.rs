//! [`Faults`]: what is wrong with a simulated GPU, so that bad situations can be tested without a GPU that is in them.
//!
//! `--device sim` reads them from the environment: `LLAVA_SIM_FAULTS` is a list, with commas, of
//!
//! | entry | means |
//! |---|---|
//! | `memory=200MiB` | the device has that much memory (KiB, MiB, GiB) |
//! | `capability=7.5` | its compute capability |
//! | `driver=11.8` | the CUDA version that its driver supports |
//! | `fail_launch=NAME` or `NAME:N` | the first, or N-th, launch of a kernel whose name begins so is refused |
//! | `crash=NAME` or `NAME:N` | that launch is taken, and the kernel goes wrong while it runs: the device is lost |

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::DevicePtr;
use super::demands::{self, Version};
use crate::error::{Error, Result};

const VARIABLE: &str = "LLAVA_SIM_FAULTS";

/// What is wrong with a simulated GPU; nothing by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Bytes of memory; without it, what the host has.
    pub memory: Option<usize>,
    /// Its compute capability.
    pub capability: Option<Version>,
    /// The CUDA version that its driver supports.
    pub driver: Option<Version>,
    /// A launch that is refused.
    pub fail_launch: Option<NthLaunch>,
    /// A launch whose kernel goes wrong while it runs.
    pub crash: Option<NthLaunch>,
}

/// The `n`-th launch, from 1, of kernels whose names begin with `kernel`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NthLaunch {
    /// How the name begins.
    pub kernel: String,
    /// Which launch of theirs.
    pub n: usize,
}

impl Faults {
    /// Those that `LLAVA_SIM_FAULTS` asks for.
    pub fn from_environment() -> Result<Self> {
        // Bytes that are no UTF-8 become an entry that does not exist, which is refused.
        std::env::var_os(VARIABLE).map_or_else(|| Ok(Self::default()), |list| Self::parse(&list.to_string_lossy()))
    }

    /// Reads a list as the head of this file describes it.
    pub fn parse(list: &str) -> Result<Self> {
        let mut faults = Self::default();
        for entry in list.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let refuse = || {
                Error::usage(format!(
                    "{VARIABLE}: `{entry}`: use memory=200MiB, capability=7.5, driver=11.8, fail_launch=NAME[:N] or crash=NAME[:N]"
                ))
            };
            let (key, value) = entry.split_once('=').ok_or_else(refuse)?;
            match key {
                "memory" => faults.memory = Some(parse_size(value).ok_or_else(refuse)?),
                "capability" => faults.capability = Some(value.parse().map_err(|_| refuse())?),
                "driver" => faults.driver = Some(value.parse().map_err(|_| refuse())?),
                "fail_launch" => faults.fail_launch = Some(NthLaunch::parse(value).ok_or_else(refuse)?),
                "crash" => faults.crash = Some(NthLaunch::parse(value).ok_or_else(refuse)?),
                _ => return Err(refuse()),
            }
        }
        Ok(faults)
    }
}

impl NthLaunch {
    fn parse(text: &str) -> Option<Self> {
        let (kernel, n) = text.split_once(':').unwrap_or((text, "1"));
        let n = n.parse().ok().filter(|&n| n > 0)?;
        (!kernel.is_empty()).then(|| Self { kernel: kernel.to_owned(), n })
    }
}

/// `200MiB` in bytes.
fn parse_size(text: &str) -> Option<usize> {
    let shift = [("KiB", 10), ("MiB", 20), ("GiB", 30)].iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)));
    let (number, shift) = shift?;
    number.parse::<usize>().ok()?.checked_mul(1 << shift)
}

/// Faults, and what a simulator must remember for them.
pub(super) struct State {
    faults: Faults,
    /// Bytes in use, by address.
    allocated: Mutex<HashMap<DevicePtr, usize>>,
    n_launches: [AtomicUsize; 2],
    lost: AtomicBool,
}

impl State {
    /// Refuses a device that a real driver would not open.
    pub fn open(gpu: &str, faults: Faults) -> Result<Self> {
        faults.driver.map_or(Ok(()), demands::check_driver)?;
        faults.capability.map_or(Ok(()), |capability| demands::check_capability(gpu, capability))?;
        Ok(Self { faults, allocated: Mutex::default(), n_launches: Default::default(), lost: AtomicBool::new(false) })
    }

    /// Memory of `bytes` by `alloc`, if that many are free.
    pub fn alloc(&self, bytes: usize, alloc: impl FnOnce() -> Result<DevicePtr>) -> Result<DevicePtr> {
        self.check_lost("alloc")?;
        let Some(total) = self.faults.memory else {
            return alloc();
        };
        let mut allocated = self.allocated.lock().unwrap_or_else(PoisonError::into_inner);
        let free = total.saturating_sub(allocated.values().sum());
        if bytes > free {
            return Err(Error::memory(bytes, free, total));
        }
        let ptr = alloc()?;
        allocated.insert(ptr, bytes);
        Ok(ptr)
    }

    /// Notes that memory was given back.
    pub fn freed(&self, ptr: DevicePtr) {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner).remove(&ptr);
    }

    /// An error if an earlier kernel took the device down.
    pub fn check_lost(&self, op: &str) -> Result<()> {
        if self.lost.load(Ordering::SeqCst) { Err(demands::crashed(op, format!("a fault of {VARIABLE}"))) } else { Ok(()) }
    }

    /// Called with each launch: whether its kernel is run.
    pub fn launch(&self, kernel: &str) -> Result<bool> {
        self.check_lost(kernel)?;
        let [refused, crashed] = [&self.faults.fail_launch, &self.faults.crash];
        if self.is_hit(0, refused, kernel) {
            return Err(Error::device(kernel, format!("the launch is refused: a fault of {VARIABLE}")));
        }
        let crashes = self.is_hit(1, crashed, kernel);
        if crashes {
            self.lost.store(true, Ordering::SeqCst);
        }
        Ok(!crashes)
    }

    /// Counts a launch, and says whether it is the one.
    fn is_hit(&self, counter: usize, wanted: &Option<NthLaunch>, kernel: &str) -> bool {
        let wanted = wanted.as_ref().filter(|wanted| kernel.starts_with(&wanted.kernel));
        wanted.is_some_and(|wanted| self.n_launches[counter].fetch_add(1, Ordering::SeqCst) + 1 == wanted.n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_documented() {
        let launch = |kernel: &str, n| Some(NthLaunch { kernel: kernel.into(), n });
        let version = |s: &str| Some(s.parse().unwrap());
        let all = Faults::parse("memory=200MiB, capability=7.5,driver=11.8,fail_launch=rms_norm,crash=gemv:12,").unwrap();
        let expected = Faults {
            memory: Some(200 << 20),
            capability: version("7.5"),
            driver: version("11.8"),
            fail_launch: launch("rms_norm", 1),
            crash: launch("gemv", 12),
        };
        assert_eq!(all, expected);
        assert_eq!(Faults::parse("").unwrap(), Faults::default());
        let huge = "memory=99999999999999GiB";
        for wrong in ["memory", "memory=", "memory=5", "memory=-1KiB", huge, "capability=7", "crash=", "crash=a:0", "fail=x"] {
            let message = Faults::parse(wrong).unwrap_err().to_string();
            assert!(message.contains(wrong) && message.contains("fail_launch=NAME[:N]"), "{message}");
        }
    }
}
