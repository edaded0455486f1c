//! [`Nvidia`]: a real GPU through cudarc's bindings of the driver API, which is loaded when a GPU is asked for and not before.
//!
//! One context, one stream: work is done in the order of the calls. Kernels come from the fatbins that build.rs has embedded, so nothing
//! but the driver must be installed.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::panic::catch_unwind;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::cublaslt::{self, Library};
use super::demands::{self, Version};
use super::{Arg, DevicePtr, Driver, Function, GraphId, Launch, Matmul, PackedArgs, ProbeSize};
use crate::error::{Error, Result};

// `static FATBINS: &[(&str, &[u8])]`: a kernel file's name and what nvcc made of it.
include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// A GPU.
pub struct Nvidia {
    name: String,
    n_multiprocessors: usize,
    /// Whether a launch may begin while the one before it ends: from sm_90 on.
    launches_overlap: bool,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<Table>,
    /// With its workspace, from the first product on; none where it is not installed.
    cublaslt: OnceLock<Option<(Library, DevicePtr)>>,
}

/// What a function's number stands for.
enum Callable {
    Kernel(sys::CUfunction),
    Product(cublaslt::Plan),
}

/// Functions that were asked for, in that order, with their names; graphs in the order of their recording.
#[derive(Default)]
struct Table {
    functions: Vec<(Callable, String)>,
    by_name: HashMap<String, usize>,
    graphs: Vec<Option<sys::CUgraphExec>>,
}

// SAFETY: handles of the driver API may be used from any thread whose current context is theirs; every call sets it first.
unsafe impl Send for Nvidia {}
// SAFETY: as above; the driver API is thread-safe, and the table has a lock.
unsafe impl Sync for Nvidia {}

/// An error of the driver, in its own words.
fn failed(op: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |error| {
        let text = error.error_string().map_or_else(|_| format!("{error:?}"), |s| s.to_string_lossy().into_owned());
        if is_crash(error) { demands::crashed(op, text) } else { Error::device(op, text) }
    }
}

/// Whether an error is that of a kernel that ran: all calls that follow report it again.
fn is_crash(error: DriverError) -> bool {
    use sys::cudaError_enum as E;
    matches!(
        error.0,
        E::CUDA_ERROR_ILLEGAL_ADDRESS
            | E::CUDA_ERROR_LAUNCH_TIMEOUT
            | E::CUDA_ERROR_ASSERT
            | E::CUDA_ERROR_HARDWARE_STACK_ERROR
            | E::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | E::CUDA_ERROR_MISALIGNED_ADDRESS
            | E::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | E::CUDA_ERROR_INVALID_PC
            | E::CUDA_ERROR_LAUNCH_FAILED
    )
}

impl Nvidia {
    /// Whether this machine has the driver's library.
    pub fn has_driver() -> bool {
        // SAFETY: it only tries to open the library.
        unsafe { sys::is_culib_present() }
    }

    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// If this build has no GPU kernels, or the machine no driver, no such GPU, or one that the kernels were not compiled for.
    pub fn open(ordinal: usize) -> Result<Self> {
        if FATBINS.is_empty() {
            return Err(Error::Unsupported("this build has no GPU kernels: it was made without nvcc".into()));
        }
        if !Self::has_driver() {
            return Err(Error::Unsupported("this machine has no NVIDIA driver: libcuda was not found".into()));
        }
        // The bindings panic where a driver lacks a function. One that is merely too old is refused before.
        let opened = catch_unwind(|| Self::open_checked(ordinal));
        opened.unwrap_or_else(|_| {
            Err(Error::Unsupported("the NVIDIA driver lacks functions that are needed: install it anew".into()))
        })
    }

    fn open_checked(ordinal: usize) -> Result<Self> {
        let mut version = 0;
        // SAFETY: it writes the number; it may be called before `cuInit`.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
        demands::check_driver(Version::of_driver(version))?;
        result::init().map_err(failed("cuInit"))?;
        let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))? as usize;
        if ordinal >= count {
            return Err(Error::Unsupported(format!("there is no GPU {ordinal}: this machine has {count}")));
        }
        let device = result::device::get(ordinal as i32).map_err(failed("cuDeviceGet"))?;
        use sys::CUdevice_attribute_enum as Attribute;
        // SAFETY: the device exists.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(failed("cuDeviceGetAttribute"));
        let name = result::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
        let capability = Version {
            major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        };
        demands::check_capability(&name, capability)?;
        let n_multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        // SAFETY: the device exists; the context is released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // From here on `drop` gives back what there is.
        let null = std::ptr::null_mut();
        let mut gpu = Self {
            name,
            n_multiprocessors,
            launches_overlap: capability.major >= 9,
            device,
            context,
            stream: null,
            modules: Vec::new(),
            functions: Mutex::default(),
            cublaslt: OnceLock::new(),
        };
        gpu.enter()?;
        gpu.stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        for (file, image) in FATBINS {
            // SAFETY: a whole fatbin, as nvcc wrote it.
            let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
            gpu.modules.push(module.map_err(failed(&format!("kernels/{file}.cu")))?);
        }
        Ok(gpu)
    }

    /// Makes this GPU's context the calling thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cuCtxSetCurrent"))
    }

    /// cuBLASLt and its workspace, if it is installed and there is memory for that.
    fn cublaslt(&self) -> Option<&(Library, DevicePtr)> {
        let open = || Some((Library::open()?, self.alloc(cublaslt::WORKSPACE_BYTES).ok()?));
        self.cublaslt.get_or_init(open).as_ref()
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        // Errors in taking down are of no use to anybody: the process goes on without the GPU.
        // SAFETY: all of these are ours, and nothing else uses them once `self` is dropped.
        unsafe {
            let _ = self.enter();
            if !self.stream.is_null() {
                let _ = result::stream::synchronize(self.stream);
                let _ = result::stream::destroy(self.stream);
            }
            if let Some((_, workspace)) = self.cublaslt.get().and_then(Option::as_ref) {
                let _ = result::free_sync(workspace.0);
            }
            for &module in &self.modules {
                let _ = result::module::unload(module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Driver for Nvidia {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn n_multiprocessors(&self) -> usize {
        self.n_multiprocessors
    }

    fn probe_size(&self) -> ProbeSize {
        ProbeSize { read_bytes: 1 << 30, product: 8192 }
    }

    fn function(&self, name: &str) -> Result<Function> {
        let mut table = self.table();
        if let Some(&i) = table.by_name.get(name) {
            return Ok(Function(i));
        }
        self.enter()?;
        let symbol = CString::new(name).map_err(|_| Error::device(name, "no name of a kernel"))?;
        // SAFETY: the modules are loaded.
        let found = self.modules.iter().find_map(|&m| unsafe { result::module::get_function(m, symbol.clone()) }.ok());
        let function = found.ok_or_else(|| Error::device(name, "this build has no such kernel"))?;
        use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as OPT_IN;
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX_SHARED;
        // SAFETY: device and function exist. More than 48 KiB must be asked for once.
        unsafe {
            let most = result::device::get_attribute(self.device, OPT_IN).map_err(failed("cuDeviceGetAttribute"))?;
            result::function::set_function_attribute(function, MAX_SHARED, most).map_err(failed(name))?;
        }
        table.functions.push((Callable::Kernel(function), name.to_owned()));
        let i = table.functions.len() - 1;
        table.by_name.insert(name.to_owned(), i);
        Ok(Function(i))
    }

    fn matmul(&self, matmul: &Matmul) -> Result<Option<Function>> {
        self.enter()?;
        let Some(plan) = self.cublaslt().and_then(|(library, _)| library.plan(matmul)) else {
            return Ok(None);
        };
        let mut table = self.table();
        table.functions.push((Callable::Product(plan), format!("cuBLASLt, {matmul:?}")));
        Ok(Some(Function(table.functions.len() - 1)))
    }

    fn alloc(&self, bytes: usize) -> Result<DevicePtr> {
        self.enter()?;
        // SAFETY: the memory is given back by `free` alone. (The driver refuses to allocate nothing.)
        let ptr = unsafe { result::malloc_sync(bytes.max(1)) };
        ptr.map(DevicePtr).map_err(|e| match result::mem_get_info() {
            Ok((free, total)) if e.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => Error::memory(bytes, free, total),
            _ => failed("alloc")(e),
        })
    }

    unsafe fn free(&self, ptr: DevicePtr) {
        // A failure to give back can be neither mended nor reported from a drop.
        // SAFETY: the caller's; cuMemFree waits for work in flight.
        unsafe {
            let _ = self.enter();
            let _ = result::free_sync(ptr.0);
        }
    }

    unsafe fn upload(&self, dst: DevicePtr, src: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's; pageable memory is read before the call returns.
        unsafe { result::memcpy_htod_async(dst.0, src, self.stream) }.map_err(failed("upload"))
    }

    unsafe fn download(&self, dst: &mut [u8], src: DevicePtr) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's; the copy is waited for while `dst` is borrowed.
        unsafe {
            result::memcpy_dtoh_async(dst, src.0, self.stream).map_err(failed("download"))?;
            result::stream::synchronize(self.stream).map_err(failed("download"))
        }
    }

    unsafe fn clear(&self, dst: DevicePtr, bytes: usize) -> Result<()> {
        self.enter()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's.
        unsafe { result::memset_d8_async(dst.0, 0, bytes, self.stream) }.map_err(failed("clear"))
    }

    fn record(&self, launches: &[Launch]) -> Result<GraphId> {
        self.enter()?;
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours. While it captures, launches are noted down and not made.
        unsafe {
            result::stream::begin_capture(self.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed("begin capture"))?;
            let noted = launches.iter().try_for_each(|launch| self.launch(launch));
            let graph = result::stream::end_capture(self.stream);
            // A launch that was refused spoils the capture: its own error comes first.
            let made = noted.and_then(|()| {
                let graph = graph.map_err(failed("end capture"))?;
                result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)).map_err(failed("instantiate graph"))
            });
            if let Ok(graph) = graph {
                let _ = result::graph::destroy(graph); // the executable copy is what is launched
            }
            let mut table = self.table();
            table.graphs.push(Some(made?));
            Ok(GraphId(table.graphs.len() - 1))
        }
    }

    unsafe fn replay(&self, graph: GraphId) -> Result<()> {
        self.enter()?;
        let graph = self.table().graphs[graph.0].ok_or_else(|| Error::device("replay", "the graph was forgotten"))?;
        // SAFETY: the graph exists; the rest is the caller's.
        unsafe { result::graph::launch(graph, self.stream) }.map_err(failed("launch graph"))
    }

    fn forget(&self, graph: GraphId) {
        if let Some(graph) = self.table().graphs[graph.0].take() {
            // A failure leaks a few kilobytes and means nothing else.
            // SAFETY: it was ours, and is in the table no more.
            unsafe {
                let _ = self.enter();
                let _ = result::graph::exec_destroy(graph);
            }
        }
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        self.enter()?;
        let table = self.table();
        let (callable, name) = &table.functions[launch.function.0];
        match callable {
            // SAFETY: the caller's for the arguments.
            Callable::Kernel(function) => unsafe { self.launch_kernel(*function, launch) }.map_err(failed(name)),
            Callable::Product(plan) => {
                let (library, workspace) = self.cublaslt().expect("it has made a plan");
                let &[Arg::Ptr(y), Arg::Ptr(x), Arg::Ptr(w)] = launch.args.as_slice() else {
                    return Err(Error::device(name.as_str(), "takes y, x and W"));
                };
                // SAFETY: the caller's for the pointers; the plan is this library's, whose workspace nothing but the stream's products use.
                let made = unsafe { library.run(plan, [y, x, w], *workspace, self.stream.cast()) };
                made.map_err(|e| Error::device(name.as_str(), format!("{:?}", e.0)))
            }
        }
    }

    unsafe fn time(&self, launches: &[Launch]) -> Result<f64> {
        self.enter()?;
        let (start, end) = (Event::new()?, Event::new()?);
        // SAFETY: the caller's for the launches; the events are ours, on the one stream, and passed when they are compared.
        unsafe {
            result::event::record(start.0, self.stream).map_err(failed("record event"))?;
            launches.iter().try_for_each(|launch| self.launch(launch))?;
            result::event::record(end.0, self.stream).map_err(failed("record event"))?;
            result::stream::synchronize(self.stream).map_err(failed("wait for launches"))?;
            result::event::elapsed(start.0, end.0).map(f64::from).map_err(failed("elapsed time"))
        }
    }
}

/// A mark in the stream, which keeps the time when it is passed.
struct Event(sys::CUevent);

impl Event {
    /// For the context at hand.
    fn new() -> Result<Self> {
        result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map(Self).map_err(failed("create event"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // A failure leaks a few bytes and means nothing else.
        // SAFETY: it is ours; the driver keeps what is still under way until it is done.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Nvidia {
    /// # Safety
    /// That of [`Driver::launch`].
    unsafe fn launch_kernel(&self, function: sys::CUfunction, launch: &Launch) -> std::result::Result<(), DriverError> {
        let mut packed = PackedArgs::new(&launch.args);
        let [x, y, z] = launch.grid.blocks.map(|n| n as u32);
        // Every kernel waits for the launch before it by itself (`wait_for_previous` in kernels/common.cuh).
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.grid.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.grid.shared_bytes as u32,
            hStream: self.stream,
            attrs: &mut overlap,
            numAttrs: self.launches_overlap.into(),
        };
        // SAFETY: the caller's for the kernel; configuration and array of addresses live through the call, which copies what they point to.
        unsafe { sys::cuLaunchKernelEx(&config, function, packed.as_mut_ptr(), std::ptr::null_mut()) }.result()
    }
}
