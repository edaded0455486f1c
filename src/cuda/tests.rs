//! Kernels in the simulator. (The ops as such are tested from one case table for all devices: tests/ops.rs.)

use super::Cuda;
use crate::dtype::DType;
use crate::tensor::Tensor;

#[test]
fn rms_norm_runs() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let cuda = Cuda::simulated(2, dtype).unwrap();
        let host: Vec<f32> = (0..3 * 111).map(|i| (i % 17) as f32 - 5.0).collect();
        let x = cuda.to_device(Tensor::from_slice(&[3, 111], &host).converted(dtype)).unwrap();
        let w = cuda.to_device(Tensor::from_slice(&[111], &[1.0f32; 111])).unwrap();
        let mut y = cuda.zeros(&[3, 111], dtype).unwrap();
        cuda.rms_norm(&mut y, &x, &w, 1e-5).unwrap();
        let y = cuda.to_host(&y).unwrap().to_f32();
        for (y, x) in y.chunks(111).zip(host.chunks(111)) {
            let rms = (x.iter().map(|v| v * v).sum::<f32>() / 111.0).sqrt();
            assert!(y.iter().zip(x).all(|(y, x)| (y - x / rms).abs() < 0.01), "{dtype}: {y:?}");
        }
    }
}
