//! [`Peaks`]: what a device can do at best, as [`Ops::measure_peaks`](super::Ops::measure_peaks) finds it.

use std::fmt;

use crate::dtype::DType;

/// What a device can do at best, measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Peaks {
    /// Memory read by the whole device at once, in GB/s.
    pub read_gbps: f64,
    /// Arithmetic, as far as it was probed, and by what.
    pub arithmetic: Vec<ArithmeticPeak>,
}

/// What products are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    /// Floating-point numbers, with sums in f32.
    Float(DType),
    /// Integers of at most 8 bits, with integer sums.
    Int8,
}

impl fmt::Display for Operands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(dtype) => dtype.fmt(f),
            Self::Int8 => f.write_str("int8"),
        }
    }
}

/// The rate that one probe of arithmetic reached.
#[derive(Clone, Debug, PartialEq)]
pub struct ArithmeticPeak {
    /// What is multiplied.
    pub operands: Operands,
    /// What ran: the rate is a limit only as far as that is the best there is.
    pub how: String,
    /// A fused multiply-add counted as two operations, in GFLOP/s.
    pub gflops: f64,
}

impl Peaks {
    /// The best rate with these operands, in GFLOP/s.
    pub fn gflops(&self, operands: Operands) -> Option<f64> {
        self.arithmetic.iter().filter(|p| p.operands == operands).map(|p| p.gflops).reduce(f64::max)
    }

    /// The rate that bounds a model whose matrices are stored in `dtype`: with operands of that kind, or of f32, to which a device that has
    /// no such arithmetic widens them.
    pub fn limit_gflops(&self, dtype: DType) -> Option<f64> {
        self.gflops(Operands::Float(dtype)).or_else(|| self.gflops(Operands::Float(DType::F32)))
    }

    /// The rate that bounds products with packed weights: that of integers, or on a device that unpacks them to multiply in `dtype`, as
    /// [`Self::limit_gflops`].
    pub fn limit_packed_gflops(&self, dtype: DType) -> Option<f64> {
        self.gflops(Operands::Int8).or_else(|| self.limit_gflops(dtype))
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
        let peak = |dtype, gflops| ArithmeticPeak { operands: Operands::Float(dtype), how: "test".into(), gflops };
        let peaks = |scale: f64| Peaks {
            read_gbps: 8.0 * scale,
            arithmetic: vec![peak(DType::F32, 3.0), peak(DType::Bf16, 5.0 * scale), peak(DType::Bf16, 4.0)],
        };
        assert_eq!(peaks(1.0).limit_gflops(DType::Bf16), Some(5.0));
        assert_eq!((peaks(1.0).gflops(Operands::Float(DType::F16)), peaks(1.0).limit_gflops(DType::F16)), (None, Some(3.0)));
        let mean = peaks(1.0).zip_with(&peaks(2.0), |a, b| (a + b) / 2.0);
        assert_eq!((mean.read_gbps, mean.limit_gflops(DType::Bf16), mean.limit_gflops(DType::F32)), (12.0, Some(7.5), Some(3.0)));
        assert_eq!(mean.limit_packed_gflops(DType::Bf16), Some(7.5));
        let mut with_integers = mean;
        with_integers.arithmetic.push(ArithmeticPeak { operands: Operands::Int8, how: "test".into(), gflops: 9.0 });
        assert_eq!(with_integers.limit_packed_gflops(DType::Bf16), Some(9.0));
    }
}
