//! The devices that every op case runs on: the CPU, and the CUDA kernels in each dtype of activations, simulated or on a GPU.

use half::{bf16, f16};
use llava_engine::cpu::Cpu;
use llava_engine::cpu::simd::Isa;
use llava_engine::dtype::DType;
use llava_engine::engine::{EngineOptions, open_device, open_grad_device};
use llava_engine::ops::{GradOps, Matrix, Ops};
use llava_engine::tensor::Tensor;

use super::kernel_device;

/// A device under test; of training ops, `TestDevice<dyn GradOps>`.
pub struct TestDevice<D: ?Sized = dyn Ops> {
    pub name: String,
    pub ops: Box<D>,
    /// Of activations; results are compared with the naive op rounded to it.
    pub dtype: DType,
}

/// All of them.
pub fn devices() -> Vec<TestDevice> {
    let cpu = |threads| -> TestDevice {
        TestDevice {
            name: format!("cpu with {threads} threads"),
            ops: Box::new(Cpu::new(threads, DType::F32).unwrap()),
            dtype: DType::F32,
        }
    };
    let mut all = vec![cpu(1), cpu(3)];
    all.extend(kernel_devices());
    all
}

/// Those that train: the CPU, in each instruction set that this machine has, and the CUDA kernels.
pub fn grad_devices() -> Vec<TestDevice<dyn GradOps>> {
    grad_cpus().into_iter().chain(grad_kernel_devices()).collect()
}

/// The CPU in each instruction set that this machine has.
pub fn grad_cpus() -> Vec<TestDevice<dyn GradOps>> {
    let supported = Isa::ALL.into_iter().filter(|isa| isa.is_supported());
    supported.enumerate().map(|(i, isa)| cpu_with(isa, 1 + i % 3)).collect()
}

/// As [`kernel_devices`], to train.
pub fn grad_kernel_devices() -> Vec<TestDevice<dyn GradOps>> {
    let Some(device) = kernel_device() else { return Vec::new() };
    let open =
        |dtype| TestDevice { name: format!("{device} in {dtype}"), ops: open_grad_device(device, 2, dtype).unwrap().0, dtype };
    [DType::F32, DType::F16, DType::Bf16].map(open).into()
}

/// Checks that `results` are the same to the last bit on the CPU with any number of threads, and on other devices from run to run.
pub fn check_repeatable<R: PartialEq>(results: impl Fn(&TestDevice<dyn GradOps>) -> R) {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
        let one = results(&cpu_with(isa, 1));
        for threads in [1, 2, 3, 7] {
            assert!(results(&cpu_with(isa, threads)) == one, "{isa} with {threads} threads");
        }
    }
    for device in grad_kernel_devices() {
        assert!(results(&device) == results(&device), "{}", device.name);
    }
}

/// What is exact for several devices: computed for the first of those that have one key, which come one after the other.
pub struct Shared<K, T>(Option<(K, T)>);

impl<K: PartialEq, T> Shared<K, T> {
    pub fn new() -> Self {
        Self(None)
    }

    /// That of `key`.
    pub fn get(&mut self, key: K, compute: impl FnOnce() -> T) -> &mut T {
        if self.0.as_ref().is_none_or(|(of, _)| *of != key) {
            self.0 = Some((key, compute()));
        }
        &mut self.0.as_mut().unwrap().1
    }
}

/// The CPU with an instruction set.
pub fn cpu_with(isa: Isa, threads: usize) -> TestDevice<dyn GradOps> {
    TestDevice {
        name: format!("cpu ({isa}) with {threads} threads"),
        ops: Box::new(Cpu::with_isa(threads, isa)),
        dtype: DType::F32,
    }
}

/// The CUDA kernels in f32, f16 and bf16, on [`kernel_device`]; none if there is no such device.
pub fn kernel_devices() -> Vec<TestDevice> {
    kernel_devices_with(false)
}

/// The same, with 8-bit activations for products of many tokens with weights of 8 bits, if `w8a8`.
pub fn kernel_devices_with(w8a8: bool) -> Vec<TestDevice> {
    let Some(device) = kernel_device() else { return Vec::new() };
    let open = |dtype| {
        let options = EngineOptions { device, threads: 2, w8a8, ..Default::default() };
        TestDevice { name: format!("{device} in {dtype}"), ops: open_device(&options, dtype).unwrap().ops, dtype }
    };
    [DType::F32, DType::F16, DType::Bf16].map(open).into()
}

/// `x` as `dtype` holds it.
pub fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

impl<D: Ops + ?Sized> TestDevice<D> {
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

    /// A matrix's elements.
    pub fn matrix(&self, matrix: &Matrix) -> Vec<f32> {
        match matrix {
            Matrix::Dense(tensor) => self.get(tensor),
            Matrix::Packed(packed) => packed.map(|t| self.ops.to_host(t)).unwrap().to_f32(),
        }
    }

    /// A tensor's elements.
    pub fn get(&self, tensor: &Tensor) -> Vec<f32> {
        self.ops.download(tensor).unwrap()
    }
}
