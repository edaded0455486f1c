//! [`Peaks`]: what a device can do at best, as [`Ops::measure_peaks`](super::Ops::measure_peaks) finds it.

use crate::dtype::DType;

/// What a device can do at best, measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Peaks {
    /// Memory read by the whole device at once, in GB/s.
    pub read_gbps: f64,
    /// Arithmetic, as far as it was probed, and by what.
    pub arithmetic: Vec<ArithmeticPeak>,
}

/// The rate that one probe of arithmetic reached.
#[derive(Clone, Debug, PartialEq)]
pub struct ArithmeticPeak {
    /// Of the operands; sums are f32.
    pub dtype: DType,
    /// What ran: the rate is a limit only as far as that is the best there is.
    pub how: String,
    /// A fused multiply-add counted as two operations, in GFLOP/s.
    pub gflops: f64,
}

impl Peaks {
    /// The best rate with operands of `dtype`, in GFLOP/s.
    pub fn gflops(&self, dtype: DType) -> Option<f64> {
        self.arithmetic.iter().filter(|p| p.dtype == dtype).map(|p| p.gflops).reduce(f64::max)
    }

    /// The rate that bounds a model whose matrices are stored in `dtype`: with operands of that kind, or of f32, to which a device that has
    /// no such arithmetic widens them.
    pub fn limit_gflops(&self, dtype: DType) -> Option<f64> {
        self.gflops(dtype).or_else(|| self.gflops(DType::F32))
    }

    /// `f` of each rate of two measurements of one device.
    pub fn zip_with(mut self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        self.read_gbps = f(self.read_gbps, other.read_gbps);
        for (a, b) in self.arithmetic.iter_mut().zip(&other.arithmetic) {
            a.gflops = f(a.gflops, b.gflops);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_the_best_of_the_dtype_or_that_of_f32() {
        let peak = |dtype, gflops| ArithmeticPeak { dtype, how: "test".into(), gflops };
        let peaks = |scale: f64| Peaks {
            read_gbps: 8.0 * scale,
            arithmetic: vec![peak(DType::F32, 3.0), peak(DType::Bf16, 5.0 * scale), peak(DType::Bf16, 4.0)],
        };
        assert_eq!(peaks(1.0).limit_gflops(DType::Bf16), Some(5.0));
        assert_eq!((peaks(1.0).gflops(DType::F16), peaks(1.0).limit_gflops(DType::F16)), (None, Some(3.0)));
        let mean = peaks(1.0).zip_with(&peaks(2.0), |a, b| (a + b) / 2.0);
        assert_eq!((mean.read_gbps, mean.gflops(DType::Bf16), mean.gflops(DType::F32)), (12.0, Some(7.5), Some(3.0)));
    }
}
