//! The kernel simulator itself: what is wrong in a kernel is reported, its correct twin runs (`kernels/sim/faults.cu`); and tensor-core
//! instructions and conversions give what the PTX manual and the `half` crate say.
#![cfg(llava_sim)]

mod reference;

use half::{bf16, f16};
use llava_engine::cuda::driver::{Arg, DevicePtr, Driver, Grid, Launch, Matmul, Simulator};
use llava_engine::dtype::DType;

/// A simulator, and what tests do with it.
struct Bench(Simulator);

/// Device memory of a test, freed with it.
struct Memory<'a> {
    bench: &'a Bench,
    ptr: DevicePtr,
    bytes: usize,
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        // SAFETY: it came from this simulator, whose launches are over when they return.
        unsafe { self.bench.0.free(self.ptr) }
    }
}

impl Memory<'_> {
    fn arg(&self) -> Arg {
        Arg::Ptr(self.ptr)
    }

    fn read<T: bytemuck::Pod>(&self) -> Vec<T> {
        let mut values = vec![T::zeroed(); self.bytes / size_of::<T>()];
        // SAFETY: the memory has that many bytes.
        unsafe { self.bench.0.download(bytemuck::cast_slice_mut(&mut values), self.ptr).unwrap() };
        values
    }
}

impl Bench {
    fn new() -> Self {
        Self(Simulator::new(2))
    }

    fn blank(&self, bytes: usize) -> Memory<'_> {
        Memory { bench: self, ptr: self.0.alloc(bytes).unwrap(), bytes }
    }

    fn put<T: bytemuck::Pod>(&self, values: &[T]) -> Memory<'_> {
        let memory = self.blank(size_of_val(values));
        // SAFETY: it was just made for them.
        unsafe { self.0.upload(memory.ptr, bytemuck::cast_slice(values)).unwrap() };
        memory
    }

    /// Runs `blocks` blocks; an error is what the simulator says.
    fn launch(&self, kernel: &str, blocks: usize, threads: usize, shared_bytes: usize, args: &[Arg]) -> Result<(), String> {
        let function = self.0.function(kernel).unwrap();
        let grid = Grid { blocks: [blocks, 1, 1], threads, shared_bytes };
        // SAFETY: the simulator compares arguments with the kernel's, and stops each access that leaves its allocation by less than
        // 1 MiB, and each write to the host; no test goes further.
        let result = unsafe { self.0.launch(&Launch { function, grid, args: args.to_vec() }) };
        result.map_err(|e| e.to_string())
    }

    /// Checks that a launch of one block is stopped with a message that names the kernel and has all of `words`.
    fn reports(&self, kernel: &str, threads: usize, shared_bytes: usize, args: &[Arg], words: &[&str]) {
        let message = self.launch(kernel, 1, threads, shared_bytes, args).expect_err(kernel);
        assert!(words.iter().chain([&kernel]).all(|word| message.contains(word)), "{kernel}: {message}, expected {words:?}");
    }
}

/// Threads of the tests' blocks: two warps.
const THREADS: usize = 64;

#[test]
fn races_in_shared_memory_are_reported() {
    let bench = Bench::new();
    let out = bench.blank(THREADS * 4);
    for kernel in ["fault_read_after_write", "fault_write_after_read"] {
        let args = |distance, barrier| [out.arg(), Arg::Int(distance), Arg::Int(barrier)];
        // Within the only warp: the other's turn is later, or was before.
        bench.reports(kernel, 32, 128, &args(1, 0), &["race in shared memory", "written by thread 1 and was read by thread 0"]);
        bench.reports(kernel, 32, 128, &args(31, 0), &["race in shared memory", "was written by"]);
        // Between warps, where a barrier of the warp is not enough.
        bench.reports(kernel, THREADS, THREADS * 4, &args(32, 0), &["race in shared memory"]);
        bench.reports(kernel, THREADS, THREADS * 4, &args(32, 1), &["race in shared memory"]);
        bench.launch(kernel, 1, 32, 128, &args(1, 1)).unwrap();
        assert!(out.read::<i32>().iter().take(32).enumerate().all(|(i, &v)| v as usize == (i + 1) % 32));
        for distance in [0, 1, 32, 63] {
            bench.launch(kernel, 1, THREADS, THREADS * 4, &args(distance, 2)).unwrap();
            assert!(out.read::<i32>().iter().enumerate().all(|(i, &v)| v as usize == (i + distance as usize) % THREADS));
        }
        // What a thread wrote itself it may read at once.
        bench.launch(kernel, 1, THREADS, THREADS * 4, &args(0, 0)).unwrap();
    }
    let args = |n| [out.arg(), Arg::Int(n)];
    for n in [2, 64] {
        bench.reports("fault_write_after_write", THREADS, 256, &args(n), &["written by thread 1 and was written by thread 0"]);
    }
    bench.launch("fault_write_after_write", 1, THREADS, 256, &args(1)).unwrap();
}

#[test]
fn accesses_out_of_bounds_are_reported() {
    let bench = Bench::new();
    let out = bench.put(&vec![0i32; THREADS]);
    let global = |first, write| [out.arg(), Arg::Int(first), Arg::Int(write)];
    bench.launch("fault_global_bounds", 1, THREADS, 0, &global(0, 1)).unwrap();
    bench.launch("fault_global_bounds", 1, THREADS, 0, &global(0, 0)).unwrap();
    for first in [1, -1, 900, -1000, 200_000, -200_000] {
        bench.reports("fault_global_bounds", THREADS, 0, &global(first, 1), &["write out of bounds", "256 bytes", "block 0,0,0"]);
        bench.reports("fault_global_bounds", THREADS, 0, &global(first, 0), &["read out of bounds", "256 bytes"]);
    }
    // Nothing of that got through.
    assert!(out.read::<i32>().iter().enumerate().all(|(i, &v)| v == i as i32 || (i == 0 && v == 2)));

    // Further away there may be anything, but nothing to be written.
    let mut host = [0i32; THREADS];
    let host_args = [Arg::Ptr(DevicePtr(host.as_mut_ptr() as u64)), Arg::Int(0), Arg::Int(1)];
    bench.reports("fault_global_bounds", THREADS, 0, &host_args, &["write out of bounds", "not the device's"]);

    let shared = |n| [out.arg(), Arg::Int(n)];
    bench.launch("fault_shared_bounds", 1, 32, 128, &shared(32)).unwrap();
    bench.reports("fault_shared_bounds", 32, 128, &shared(33), &["write out of bounds", "shared memory", "the launch gave 128"]);
    bench.reports("fault_shared_bounds", 32, 0, &shared(1), &["write out of bounds", "the launch gave 0"]);
}

#[test]
fn memory_that_nobody_wrote_is_no_number() {
    let bench = Bench::new();
    let out = bench.put(&[1.0f32; 32]);
    bench.launch("fault_unwritten", 1, 32, 128, &[out.arg()]).unwrap();
    assert!(out.read::<f32>().iter().all(|v| v.is_nan()));
    assert!(bench.blank(64).read::<f32>().iter().all(|v| v.is_nan()));
}

#[test]
fn misaligned_vectors_are_reported() {
    let bench = Bench::new();
    let (out, input) = (bench.blank(16), bench.put(&[0.0f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
    let args = |first| [out.arg(), input.arg(), Arg::Int(first)];
    for first in [1, 2, 3] {
        bench.reports("fault_misaligned", 1, 0, &args(first), &["access to 16 bytes", "no multiple"]);
    }
    bench.launch("fault_misaligned", 1, 1, 0, &args(4)).unwrap();
    assert_eq!(out.read::<f32>(), [4.0, 5.0, 6.0, 7.0]);
}

#[test]
fn what_comes_before_the_wait_for_the_launch_before_is_reported() {
    let bench = Bench::new();
    let (out, input) = (bench.blank(16), bench.put(&[1.0f32, 2.0, 3.0, 4.0]));
    let args = |read_early, constant, write_early| {
        [out.arg(), input.arg(), Arg::Int(read_early), Arg::Int(constant), Arg::Int(write_early)]
    };
    bench.reports("fault_early", 1, 0, &args(1, 0, 0), &["read of global memory before"]);
    bench.reports("fault_early", 1, 0, &args(0, 0, 1), &["write of global memory before"]);
    for (read_early, constant) in [(1, 1), (0, 0)] {
        bench.launch("fault_early", 1, 1, 0, &args(read_early, constant, 0)).unwrap();
        assert_eq!(out.read::<f32>(), [1.0, 2.0, 3.0, 4.0]);
    }
}

#[test]
fn divergent_barriers_are_reported() {
    let bench = Bench::new();
    let out = bench.blank(THREADS * 4);
    let args = |n| [out.arg(), Arg::Int(n)];
    for n in [1, 32, 63] {
        let returned = format!("{} of 64 threads have returned", 64 - n);
        bench.reports("fault_barrier_left_out", THREADS, 0, &args(n), &["divergent __syncthreads", &returned, "faults.cu"]);
        bench.reports("fault_two_barriers", THREADS, 0, &args(n), &["divergent __syncthreads", "faults.cu"]);
    }
    for kernel in ["fault_barrier_left_out", "fault_two_barriers"] {
        bench.launch(kernel, 1, THREADS, 0, &args(64)).unwrap();
        bench.launch(kernel, 3, THREADS, 0, &args(64)).unwrap();
        assert_eq!(out.read::<i32>(), [1; 64]);
    }
    bench.launch("fault_barrier_left_out", 1, THREADS, 0, &args(0)).unwrap();
}

#[test]
fn collectives_that_a_lane_does_not_reach_are_reported() {
    let bench = Bench::new();
    let out = bench.blank(128);
    let args = |n| [out.arg(), Arg::Int(n)];
    for n in [1, 16, 31] {
        bench.reports("fault_lane_left_out", 32, 0, &args(n), &["deadlock", "not all of its lanes reach", "common.cuh"]);
    }
    bench.reports("fault_lane_left_out", 31, 0, &args(32), &["lane 31 has returned, or does not exist"]);
    bench.launch("fault_lane_left_out", 1, 32, 0, &args(32)).unwrap();
    assert_eq!(out.read::<f32>(), [32.0; 32]);
    bench.launch("fault_lane_left_out", 1, 32, 0, &args(0)).unwrap();
}

#[test]
fn shuffles_from_lanes_outside_of_the_mask_are_reported() {
    let bench = Bench::new();
    let out = bench.blank(128);
    let args = |lanes| [out.arg(), Arg::Int(lanes)];
    bench.reports("fault_shuffle_outside", 32, 0, &args(16), &["shuffles from lane 16", "not in the mask 0000ffff"]);
    bench.launch("fault_shuffle_outside", 1, 32, 0, &args(8)).unwrap();
    assert!(out.read::<i32>().iter().enumerate().all(|(i, &v)| v as usize == if i < 16 { i ^ 8 } else { i }));
}

#[test]
fn launches_that_do_not_fit_the_kernel_are_refused() {
    let bench = Bench::new();
    let out = bench.blank(256);
    let kernel = "fault_global_bounds"; // int*, int, int
    let wrong: [&[Arg]; 5] = [
        &[out.arg(), Arg::Int(0)],
        &[out.arg(), Arg::Int(0), Arg::Int(1), Arg::Int(1)],
        &[out.arg(), Arg::Int(0), Arg::Float(1.0)],
        &[Arg::Int(0), Arg::Int(0), Arg::Int(1)],
        &[out.arg(), out.arg(), Arg::Int(1)],
    ];
    for args in wrong {
        bench.reports(kernel, THREADS, 0, args, &["is launched with arguments", "it has (pii)"]);
    }
    let right = [out.arg(), Arg::Int(0), Arg::Int(1)];
    bench.reports(kernel, 0, 0, &right, &["cannot be launched"]);
    bench.reports(kernel, 1025, 0, &right, &["cannot be launched"]);
    bench.reports(kernel, 32, (227 << 10) + 1, &right, &["shared memory"]);
    assert!(bench.launch(kernel, 0, 32, 0, &right).unwrap_err().contains("cannot be launched"));
    let function = bench.0.function(kernel).unwrap();
    let grid = Grid { blocks: [1, 1, 65536], threads: 1, shared_bytes: 0 };
    // SAFETY: as in `Bench::launch`.
    let error = unsafe { bench.0.launch(&Launch { function, grid, args: right.to_vec() }) }.unwrap_err();
    assert!(error.to_string().contains("cannot be launched"), "{error}");
    assert!(bench.0.function("no_such_kernel").unwrap_err().to_string().contains("no such kernel"));
    bench.launch(kernel, 1, THREADS, 0, &right).unwrap();
}

#[test]
fn products_of_the_library_take_what_they_say_only() {
    let bench = Bench(Simulator::with_library(1));
    let size = Matmul { dtype: DType::F32, y_dtype: DType::F32, tokens: 1, n: 1, k: 2, y_stride: 1, add: false };
    let function = bench.0.matmul(&size).unwrap().unwrap();
    let (y, x, w) = (bench.blank(256), bench.put(&[2.0f32; 64]), bench.put(&[3.0f32; 64]));
    let multiply = |args: &[Arg]| {
        let grid = Grid { blocks: [1; 3], threads: 1, shared_bytes: 0 };
        // SAFETY: the tensors are larger than the product, wherever in their first half they begin; too few arguments are refused.
        unsafe { bench.0.launch(&Launch { function, grid, args: args.to_vec() }) }.map_err(|e| e.to_string())
    };
    assert!(multiply(&[y.arg(), x.arg()]).unwrap_err().contains("y, x and W"));
    for shifted in 0..3 {
        let mut args = [y.arg(), x.arg(), w.arg()];
        args[shifted] = Arg::Ptr([&y, &x, &w][shifted].ptr.offset(128));
        assert!(multiply(&args).unwrap_err().contains("256-byte aligned"), "operand {shifted}");
    }
    multiply(&[y.arg(), x.arg(), w.arg()]).unwrap();
    assert_eq!(y.read::<f32>()[0], 12.0);
}

#[test]
fn memory_that_the_host_has_not_is_refused() {
    assert!(Simulator::new(1).alloc(1 << 60).unwrap_err().to_string().contains("the host has no memory"));
}

/// After whatever went wrong, the next launch on the same threads is as if nothing had been.
#[test]
fn a_failed_launch_leaves_nothing_behind() {
    let bench = Bench::new();
    let (out, input) = (bench.blank(THREADS * 16), bench.put(&vec![1.0f32; THREADS * 4]));
    let copy = |wait| [out.arg(), input.arg(), Arg::Int(wait), Arg::Int(1), Arg::Int(1), Arg::Int(16)];
    for _ in 0..20 {
        assert!(bench.launch("fault_read_after_write", 9, THREADS, 256, &[out.arg(), Arg::Int(32), Arg::Int(0)]).is_err());
        assert!(bench.launch("fault_async", 9, THREADS, THREADS * 16, &copy(0)).is_err());
        assert!(bench.launch("fault_barrier_left_out", 9, THREADS, 0, &[out.arg(), Arg::Int(3)]).is_err());
        bench.launch("fault_async", 9, THREADS, THREADS * 16, &copy(1)).unwrap();
        assert!(out.read::<f32>().iter().all(|&v| v == 1.0));
    }
}

#[test]
fn async_copies_are_there_after_the_wait_only() {
    let bench = Bench::new();
    let values = reference::random(THREADS * 8, 1);
    let (out, input) = (bench.blank(THREADS * 16), bench.put(&values));
    let args = |wait: i32, barrier: i32, distance: i32, bytes: i32| {
        [out.arg(), input.arg(), Arg::Int(wait), Arg::Int(barrier), Arg::Int(distance), Arg::Int(bytes)]
    };
    let shared = THREADS * 16;
    // Not waited for: neither one's own data nor, after a barrier, that of others.
    bench.reports("fault_async", THREADS, shared, &args(0, 0, 0, 16), &["read", "cp.async", "no wait"]);
    bench.reports("fault_async", THREADS, shared, &args(0, 1, 0, 16), &["read", "cp.async", "no wait"]);
    bench.reports("fault_async", THREADS, shared, &args(0, 1, 32, 16), &["read", "cp.async", "no wait"]);
    // Waited for, but only by the thread that copied.
    bench.reports("fault_async", THREADS, shared, &args(1, 0, 32, 16), &["race in shared memory"]);
    bench.reports("fault_async", THREADS, shared, &args(1, 0, 1, 16), &["race in shared memory"]);
    bench.launch("fault_async", 1, THREADS, shared, &args(1, 0, 0, 16)).unwrap();
    assert_eq!(out.read::<f32>(), values[..THREADS * 4]);
    bench.launch("fault_async", 1, THREADS, shared, &args(1, 1, 5, 16)).unwrap();
    assert_eq!(out.read::<f32>(), [&values[20..THREADS * 4], &values[..20]].concat());

    // Bytes that are not copied are zero, and need not exist.
    for words in 0..4 {
        let short = bench.put(&values[..(THREADS - 1) * 4 + words]);
        let mut args = args(1, 1, 0, words as i32 * 4);
        args[1] = short.arg();
        bench.launch("fault_async", 1, THREADS, shared, &args).unwrap();
        let expected = [&values[..(THREADS - 1) * 4 + words], &[0.0; 4][words..]].concat();
        assert_eq!(out.read::<f32>(), expected);
        args[5] = Arg::Int(words as i32 * 4 + 4);
        bench.reports("fault_async", THREADS, shared, &args, &["read out of bounds"]);
    }
    // The place, too, must exist.
    bench.reports("fault_async", THREADS, shared - 4, &args(1, 1, 0, 16), &["write out of bounds", "shared memory"]);

    let group = |read| [out.arg(), input.arg(), Arg::Int(read)];
    bench.launch("fault_async_group", 1, THREADS, 2 * shared, &group(0)).unwrap();
    assert_eq!(out.read::<f32>(), values[..THREADS * 4]);
    bench.reports("fault_async_group", THREADS, 2 * shared, &group(1), &["read", "cp.async", "no wait"]);
}

// ---------------------------------------------------------------- tensor cores

/// Where the manual says that the elements of an m16n8k16 are ("Matrix Fragments for mma.m16n8k16 with floating point type"), as (lane,
/// index among its elements). Its `groupID` is lane / 4, its `threadID_in_group` lane % 4.
mod fragment {
    /// A, row and column: "row = groupID for ai where 0 <= i < 2 || 4 <= i < 6, groupID + 8 otherwise; col = (threadID_in_group * 2) +
    /// (i & 0x1) for ai where i < 4, that + 8 where i >= 4"
    pub fn a(row: usize, column: usize) -> (usize, usize) {
        (row % 8 * 4 + column % 8 / 2, column / 8 * 4 + row / 8 * 2 + column % 2)
    }

    /// B, row and column: "row = (threadID_in_group * 2) + (i & 0x1) for bi where i < 2, that + 8 where i >= 2; col = groupID"
    pub fn b(row: usize, column: usize) -> (usize, usize) {
        (column * 4 + row % 8 / 2, row / 8 * 2 + row % 2)
    }

    /// C and D: "row = groupID for ci where i < 2, groupID + 8 for i >= 2; col = (threadID_in_group * 2) + (i & 0x1)"
    pub fn c(row: usize, column: usize) -> (usize, usize) {
        (row % 8 * 4 + column / 2, row / 8 * 2 + column % 2)
    }
}

/// A multiplication: A `[16, 16]`, B `[16, 8]`, C `[16, 8]`.
struct Mma {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

/// Runs all, one block each, and gives their D.
fn multiply(kernel: &str, bits: fn(f32) -> u16, all: &[Mma]) -> Vec<Vec<f32>> {
    let (mut a, mut b, mut c) = (vec![0u16; all.len() * 256], vec![0u16; all.len() * 128], vec![0f32; all.len() * 128]);
    for (i, mma) in all.iter().enumerate() {
        for (row, k) in (0..16).flat_map(|row| (0..16).map(move |k| (row, k))) {
            let (lane, at) = fragment::a(row, k);
            a[i * 256 + lane * 8 + at] = bits(mma.a[row * 16 + k]);
        }
        for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
            let (lane, at) = fragment::b(row, column);
            b[i * 128 + lane * 4 + at] = bits(mma.b[row * 8 + column]);
            let (lane, at) = fragment::c(row, column);
            c[i * 128 + lane * 4 + at] = mma.c[row * 8 + column];
        }
    }
    let bench = Bench::new();
    let (d, a, b, c) = (bench.blank(all.len() * 512), bench.put(&a), bench.put(&b), bench.put(&c));
    bench.launch(kernel, all.len(), 32, 0, &[d.arg(), a.arg(), b.arg(), c.arg()]).unwrap();
    let d = d.read::<f32>();
    let element = |i: usize, row, column| {
        let (lane, at) = fragment::c(row, column);
        d[i * 128 + lane * 4 + at]
    };
    (0..all.len()).map(|i| (0..128).map(|e| element(i, e / 8, e % 8)).collect()).collect()
}

/// One element of A picks a row of B, one of B a column of A; all elements are different, and have exact products in both dtypes.
#[test]
fn mma_multiplies_fragments_as_the_manual_lays_them_out() {
    let numbered = |n: usize| (1..=n).map(|v| v as f32).collect::<Vec<_>>();
    let one_hot = |n: usize, at: usize| (0..n).map(|i| f32::from(i == at)).collect::<Vec<_>>();
    let c: Vec<f32> = numbered(128).iter().map(|v| v * 1024.0).collect();
    let by_a = (0..256).map(|at| Mma { a: one_hot(256, at), b: numbered(128), c: c.clone() });
    let by_b = (0..128).map(|at| Mma { a: numbered(256), b: one_hot(128, at), c: c.clone() });
    let all: Vec<Mma> = by_a.chain(by_b).collect();
    for (kernel, bits) in
        [("check_mma_f16", (|v| f16::from_f32(v).to_bits()) as fn(f32) -> u16), ("check_mma_bf16", |v| bf16::from_f32(v).to_bits())]
    {
        for (i, d) in multiply(kernel, bits, &all).iter().enumerate() {
            for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
                let picked = if i < 256 {
                    let (hot_row, k) = (i / 16, i % 16);
                    if row == hot_row { (k * 8 + column + 1) as f32 } else { 0.0 }
                } else {
                    let (k, hot_column) = ((i - 256) / 8, (i - 256) % 8);
                    if column == hot_column { (row * 16 + k + 1) as f32 } else { 0.0 }
                };
                assert_eq!(d[row * 8 + column], picked + c[row * 8 + column], "{kernel} {i}: {row}, {column}");
            }
        }
    }
}

#[test]
fn mma_sums_all_products() {
    let round: fn(f32) -> f32 = |v| bf16::from_f32(v).to_f32();
    let random = |n, seed| reference::random(n, seed).into_iter().map(round).collect::<Vec<_>>();
    let all: Vec<Mma> = (0..4).map(|i| Mma { a: random(256, i), b: random(128, i + 10), c: random(128, i + 20) }).collect();
    for (mma, d) in all.iter().zip(multiply("check_mma_bf16", |v| bf16::from_f32(v).to_bits(), &all)) {
        for (i, &d) in d.iter().enumerate() {
            let (row, column) = (i / 8, i % 8);
            let sum: f64 = (0..16).map(|k| f64::from(mma.a[row * 16 + k]) * f64::from(mma.b[k * 8 + column])).sum();
            assert!((f64::from(d) - sum - f64::from(mma.c[i])).abs() < 1e-5, "{row}, {column}");
        }
    }
}

/// "Each thread i < 8 gives the address of a row of the first matrix, 8..16 the second, …; a thread receives from each matrix the elements
/// 2·(thread % 4) and the next of row thread / 4"; with .trans, of column thread / 4.
#[test]
fn ldmatrix_hands_out_rows_as_the_manual_says() {
    let bench = Bench::new();
    // Element (row, column) of 32 rows of 8 is its own number.
    let tile: Vec<u16> = (0..256).collect();
    let (out, there) = (bench.blank(512), bench.put(&tile));
    // In order, and in an order that no pattern explains.
    for rows in [(0..32).collect::<Vec<i32>>(), (0..32).map(|i| (i * 13 + 5) % 32).collect()] {
        let order = bench.put(&rows);
        for transposed in [false, true] {
            let args = [out.arg(), there.arg(), order.arg(), Arg::Int(i32::from(transposed))];
            bench.launch("check_ldmatrix", 1, 32, 512, &args).unwrap();
            let got = out.read::<u16>();
            for (lane, matrix, half) in (0..256).map(|i| (i / 8, i / 2 % 4, i % 2)) {
                let (mut row, mut column) = (lane / 4, lane % 4 * 2 + half);
                if transposed {
                    (row, column) = (column, row);
                }
                let expected = rows[matrix * 8 + row] as usize * 8 + column;
                assert_eq!(usize::from(got[lane * 8 + matrix * 2 + half]), expected, "lane {lane}, matrix {matrix}, {transposed}");
            }
        }
    }
    // It reads shared memory as any access does.
    let outside = bench.put(&[32i32; 32]);
    bench.reports("check_ldmatrix", 32, 512, &[out.arg(), there.arg(), outside.arg(), Arg::Int(0)], &["read out of bounds"]);
}

// ---------------------------------------------------------------- conversions

/// A 16-bit float: its names in kernels, and the conversions of the `half` crate.
struct Format {
    suffix: &'static str,
    widen: fn(u16) -> f32,
    narrow: fn(f32) -> u16,
}

const FORMATS: [Format; 2] = [
    Format { suffix: "f16", widen: |b| f16::from_bits(b).to_f32(), narrow: |x| f16::from_f32(x).to_bits() },
    Format { suffix: "bf16", widen: |b| bf16::from_bits(b).to_f32(), narrow: |x| bf16::from_f32(x).to_bits() },
];

impl Format {
    fn same(&self, got: u16, expected: u16) -> bool {
        got == expected || (self.widen)(got).is_nan() && (self.widen)(expected).is_nan()
    }

    /// Every number of the format, both of its neighbours in f32, and around the middle between it and the next; and f32 at random.
    fn cases(&self) -> Vec<f32> {
        let mut cases = Vec::new();
        for bits in 0..=u16::MAX {
            let (x, next) = ((self.widen)(bits), (self.widen)(bits.wrapping_add(1)));
            let middle = ((f64::from(x) + f64::from(next)) / 2.0) as f32;
            cases.extend([x, middle].into_iter().flat_map(|x| [x.next_down(), x, x.next_up()]));
        }
        // The ties beyond the largest numbers, towards infinity.
        cases.extend([65519.996, 65520.0, 65520.004, f32::MAX, f32::INFINITY, f32::NAN, f32::from_bits(0x7f7f_8000)]);
        cases.extend(reference::random(1 << 16, 1).iter().map(|x| f32::from_bits(((x + 1.0) * f32::powi(2.0, 31)) as u32)));
        cases
    }
}

#[test]
fn every_16_bit_float_widens_exactly() {
    let bench = Bench::new();
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let (out, input) = (bench.blank(all.len() * 4), bench.put(&all));
    for format in FORMATS {
        let args = [out.arg(), input.arg(), Arg::Int(all.len() as i32)];
        bench.launch(&format!("check_widen_{}", format.suffix), 1, 256, 0, &args).unwrap();
        for (bits, got) in all.iter().zip(out.read::<f32>()) {
            let expected = (format.widen)(*bits);
            let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
            assert!(same, "{} {bits:04x}: {got}, should be {expected}", format.suffix);
        }
    }
}

#[test]
fn narrowing_rounds_to_nearest_even() {
    let bench = Bench::new();
    for format in FORMATS {
        let cases = format.cases();
        let (out, input) = (bench.blank(cases.len() * 2), bench.put(&cases));
        for (kernel, n) in [("check_narrow", cases.len()), ("check_pack2", cases.len() / 2)] {
            bench.launch(&format!("{kernel}_{}", format.suffix), 1, 256, 0, &[out.arg(), input.arg(), Arg::Int(n as i32)]).unwrap();
            for (x, got) in cases.iter().zip(out.read::<u16>()) {
                let expected = (format.narrow)(*x);
                let bits = x.to_bits();
                assert!(format.same(got, expected), "{kernel}_{} of {x} ({bits:08x}): {got:04x} {expected:04x}", format.suffix);
            }
        }
    }
}
