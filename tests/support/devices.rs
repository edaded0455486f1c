//! The devices that every op case runs on: the CPU, and the kernel simulator in each dtype of activations.

use half::{bf16, f16};
use llava_engine::cpu::Cpu;
use llava_engine::dtype::DType;
use llava_engine::ops::Ops;
use llava_engine::tensor::Tensor;

/// A device under test.
pub struct TestDevice {
    pub name: String,
    pub ops: Box<dyn Ops>,
    /// Of activations; results are compared with the naive op rounded to it.
    pub dtype: DType,
}

/// All of them.
pub fn devices() -> Vec<TestDevice> {
    let cpu = |threads| TestDevice {
        name: format!("cpu with {threads} threads"),
        ops: Box::new(Cpu::new(threads, DType::F32).unwrap()),
        dtype: DType::F32,
    };
    let mut all = vec![cpu(1), cpu(3)];
    all.extend(simulators());
    all
}

/// The simulator in f32, f16 and bf16; none if this build has no simulator.
pub fn simulators() -> Vec<TestDevice> {
    #[cfg(llava_sim)]
    return [DType::F32, DType::F16, DType::Bf16]
        .map(|dtype| TestDevice {
            name: format!("sim in {dtype}"),
            ops: Box::new(llava_engine::cuda::Cuda::simulated(2, dtype).unwrap()),
            dtype,
        })
        .into();
    #[cfg(not(llava_sim))]
    Vec::new()
}

/// `x` as `dtype` holds it.
pub fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

impl TestDevice {
    /// Activations or weights: in the device's dtype.
    pub fn put(&self, shape: &[usize], values: &[f32]) -> Tensor {
        self.ops.upload(Tensor::from_slice(shape, values).converted(self.dtype)).unwrap()
    }

    /// Biases, norm weights, tables of angles: in f32.
    pub fn put_f32(&self, shape: &[usize], values: &[f32]) -> Tensor {
        self.ops.upload(Tensor::from_slice(shape, values)).unwrap()
    }

    /// `values` as the device holds them: what the exact result is computed from.
    pub fn round(&self, values: &[f32]) -> Vec<f32> {
        values.iter().map(|&x| rounded(x, self.dtype)).collect()
    }

    /// A tensor of activations with anything in it that is easy to see.
    pub fn blank(&self, shape: &[usize]) -> Tensor {
        self.put(shape, &vec![77.0; shape.iter().product()])
    }

    /// The distance from 1 to the next number of a 16-bit dtype; 0 for f32.
    pub fn epsilon(&self) -> f64 {
        match self.dtype {
            DType::F16 => f16::EPSILON.to_f64(),
            DType::Bf16 => bf16::EPSILON.to_f64(),
            _ => 0.0,
        }
    }

    /// A tensor's elements.
    pub fn get(&self, tensor: &Tensor) -> Vec<f32> {
        self.ops.download(tensor).unwrap()
    }
}
