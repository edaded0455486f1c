//! `info`: this binary and this machine.

use llava_engine::cpu::Cpu;
use llava_engine::cuda::Cuda;
use llava_engine::dtype::DType;
use llava_engine::error::Result;
use llava_engine::ops::Ops;

use super::Outcome;
use super::common;

/// Flags of `info`.
#[derive(clap::Args)]
#[command(after_help = "Example:
  llava-engine info --measure")]
pub struct Args {
    /// Measures what this machine's memory and arithmetic can do; takes seconds
    #[arg(long)]
    measure: bool,
    /// CPU threads; 0 for as many as the machine has
    #[arg(long, default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
}

/// Informs.
pub fn run(args: &Args) -> Result<Outcome> {
    let cpu = Cpu::new(args.threads, DType::Bf16)?;
    let peaks = args.measure.then(|| cpu.measure_peaks()).transpose()?;
    let gpu = Cuda::open(0, DType::F16).map(|cuda| cuda.name());
    let hub = cfg!(feature = "hub");
    if args.json {
        common::put_json(&serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cuda": Cuda::architectures().is_some(),
            "cuda_architectures": Cuda::architectures(),
            "cuda_device": gpu.as_ref().ok(),
            "simulator": cfg!(llava_sim),
            "hub": hub,
            "device": cpu.name(),
            "threads": cpu.n_threads(),
            "read_gbps": peaks.as_ref().map(|p| p.read_gbps),
            "peaks": peaks.as_ref().map(common::peaks_json),
        }))?;
        return Ok(Outcome::Done);
    }
    let mut out = format!("llava-engine {}\n", env!("CARGO_PKG_VERSION"));
    out += &format!("SIMD paths  scalar, avx2, avx512, avx512bf16; this machine runs {}\n", cpu.name());
    out += &match Cuda::architectures() {
        None => "CUDA        not in this build, which was made without nvcc\n".to_owned(),
        Some(archs) => match &gpu {
            Ok(name) => format!("CUDA        kernels for sm_{}; this machine has {name}\n", archs.replace(',', ", sm_")),
            Err(why) => format!("CUDA        kernels for sm_{}; {why}\n", archs.replace(',', ", sm_")),
        },
    };
    out += &format!(
        "simulator   {}\n",
        if cfg!(llava_sim) { "--device sim runs the CUDA kernels without a GPU" } else { "not in this build" }
    );
    out += &format!("hub         {}\n", if hub { "models are downloaded when named by id" } else { "not in this build" });
    if let Some(peaks) = peaks {
        out += &format!("measured    {}\n", common::peaks_text(&peaks));
    }
    common::put(&out)?;
    Ok(Outcome::Done)
}
