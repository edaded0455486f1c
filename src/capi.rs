//! The C ABI: opaque handles, status codes, no unwinding across the border. The header is `include/llava_engine.h`.
//!
//! Every export catches panics and turns them, like every error, into a status; [`llava_last_error`] has the words.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::Deserialize;

use crate::engine::{Engine, EngineOptions, GenerateOptions, Turn};
use crate::error::{Error, Result};
use crate::image::{Limits, RgbImage, decode};
use crate::infer::sampler::SamplingOptions;
use crate::model::config::Profile;
use crate::ops::kv;
use crate::text::Prompt;

/// Version of this interface: raised whenever a program compiled for the last one would not work with it.
pub const LLAVA_ABI_VERSION: u32 = 1;

/// It worked.
pub const LLAVA_OK: i32 = 0;
/// An argument, option or prompt that can never work; a null pointer where none may be.
pub const LLAVA_INVALID_ARGUMENT: i32 = 1;
/// The model's files are missing, malformed, or of another kind.
pub const LLAVA_BAD_MODEL: i32 = 2;
/// An image was refused or cannot be decoded.
pub const LLAVA_BAD_IMAGE: i32 = 3;
/// The prompt does not fit the model's context.
pub const LLAVA_CONTEXT_FULL: i32 = 4;
/// This build or this machine does not have what was asked for.
pub const LLAVA_UNSUPPORTED: i32 = 5;
/// A fault in the library itself: please report it. The engine it happened in must be freed.
pub const LLAVA_INTERNAL: i32 = 6;
/// The device failed: out of memory, or a kernel went wrong. The engine must be freed.
pub const LLAVA_DEVICE: i32 = 7;

/// An open model. Calls on one engine from several threads wait for one another; different engines are independent.
pub struct LlavaEngine {
    engine: Mutex<Engine>,
    cancel: Arc<AtomicBool>,
}

/// An image file's content: PNG, JPEG, WebP, GIF or BMP.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LlavaImage {
    /// First byte.
    pub bytes: *const u8,
    /// Number of bytes.
    pub n_bytes: usize,
}

/// Called with each piece of an answer: `text` is UTF-8, `n_bytes` long and not ended by a zero byte, and valid during the call only.
/// Returning anything but 0 ends the answer. It must not unwind, and must not call into the same engine except `llava_cancel`.
pub type LlavaOnText = Option<unsafe extern "C" fn(text: *const c_char, n_bytes: usize, user: *mut c_void) -> i32>;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn set_last_error(message: &str) {
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.with(|last| *last.borrow_mut() = message);
}

fn status_of(error: &Error) -> i32 {
    match error {
        Error::Usage(_) | Error::Template { .. } => LLAVA_INVALID_ARGUMENT,
        Error::Io { .. } | Error::File { .. } | Error::Tensor { .. } | Error::Shape { .. } => LLAVA_BAD_MODEL,
        Error::Image { .. } => LLAVA_BAD_IMAGE,
        Error::Context { .. } => LLAVA_CONTEXT_FULL,
        Error::Unsupported(_) | Error::Cancelled => LLAVA_UNSUPPORTED,
        Error::Device { .. } | Error::Check { .. } | Error::Memory { .. } => LLAVA_DEVICE,
    }
}

/// Runs an export's body; errors and panics become a status.
fn guarded(body: impl FnOnce() -> Result<()>) -> i32 {
    // What a panic may leave half-done is an engine, and its mutex is poisoned then: later calls are refused.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => LLAVA_OK,
        Ok(Err(error)) => {
            set_last_error(&error.to_string());
            status_of(&error)
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            set_last_error(&format!("internal error: {}", text.unwrap_or("unknown")));
            LLAVA_INTERNAL
        }
    }
}

/// A C string as `&str`; null is `None`.
///
/// # Safety
/// `text` is null or points to bytes that end with a zero byte and stay unchanged during `'a`.
unsafe fn optional_str<'a>(text: *const c_char, what: &str) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not null, and a C string by this function's contract.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Error::usage(format!("{what} is not UTF-8")))
}

fn parse<T: for<'a> Deserialize<'a> + Default>(json: Option<&str>, what: &str) -> Result<T> {
    json.map_or_else(|| Ok(T::default()), |json| serde_json::from_str(json).map_err(|e| Error::usage(format!("{what}: {e}"))))
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct OpenRequest {
    device: Option<String>,
    dtype: Option<String>,
    kv_cache_dtype: Option<String>,
    check_ops: bool,
    check_nan: bool,
    w8a8: bool,
    threads: usize,
    model_base: Option<PathBuf>,
    mmproj: Option<PathBuf>,
    lora: Option<PathBuf>,
    preprocess: Option<String>,
    template: Option<String>,
    context_tokens: Option<usize>,
}

impl OpenRequest {
    fn options(self) -> Result<EngineOptions> {
        let profile = match self.preprocess.as_deref() {
            None => None,
            Some("hf") => Some(Profile::Hf),
            Some("original") => Some(Profile::Original),
            Some(name) => return Err(Error::usage(format!("unknown preprocessing `{name}`: use original or hf"))),
        };
        Ok(EngineOptions {
            device: self.device.as_deref().unwrap_or("auto").parse()?,
            dtype: self.dtype.as_deref().filter(|d| *d != "auto").map(str::parse).transpose()?,
            kv_dtype: kv::dtype(self.kv_cache_dtype.as_deref().unwrap_or("auto"))?,
            w8a8: self.w8a8,
            threads: self.threads,
            model_base: self.model_base,
            mmproj: self.mmproj,
            lora: self.lora,
            profile,
            template: self.template,
            context_tokens: self.context_tokens,
            n_contexts: 1,
            profile_ops: false,
            check_ops: self.check_ops,
            check_nan: self.check_nan,
        })
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct GenerateRequest {
    prompt: Option<String>,
    raw_prompt: Option<String>,
    system: Option<String>,
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    prompt_lookup: usize,
    seed: Option<u64>,
    stop: Vec<String>,
}

impl GenerateRequest {
    fn options(&self) -> GenerateOptions {
        let base = SamplingOptions::default();
        GenerateOptions {
            sampling: SamplingOptions {
                temperature: self.temperature.unwrap_or(base.temperature),
                top_k: self.top_k.unwrap_or(base.top_k),
                top_p: self.top_p.unwrap_or(base.top_p),
                min_p: self.min_p.unwrap_or(base.min_p),
                repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
                seed: self.seed.unwrap_or(base.seed),
            },
            max_new_tokens: self.max_new_tokens.unwrap_or(GenerateOptions::default().max_new_tokens),
            stop: self.stop.clone(),
            ignore_eos: false,
            prompt_lookup: self.prompt_lookup,
        }
    }

    /// The prompt, and the options with the template's stop texts.
    fn prompt(&self, engine: &Engine, n_images: usize) -> Result<(Prompt, GenerateOptions)> {
        let mut options = self.options();
        match (&self.prompt, &self.raw_prompt) {
            (Some(text), None) => {
                options.stop.extend(engine.stop_texts());
                Ok((engine.prompt(self.system.as_deref(), &[Turn::user(text, n_images)])?, options))
            }
            (None, Some(text)) => Ok((Prompt::raw(text), options)),
            _ => Err(Error::usage("request: give either `prompt` or `raw_prompt`")),
        }
    }
}

/// Version of the interface that the library has; compare it with the `LLAVA_ABI_VERSION` that you were compiled with.
#[unsafe(no_mangle)]
pub extern "C" fn llava_abi_version() -> u32 {
    LLAVA_ABI_VERSION
}

/// Version of the library, as text that is valid forever.
#[unsafe(no_mangle)]
pub extern "C" fn llava_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version has no zero bytes"),
    };
    VERSION.as_ptr()
}

/// What the last call of this thread that failed had to say; empty before any. Valid until the next call of this thread.
#[unsafe(no_mangle)]
pub extern "C" fn llava_last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}

/// Opens the model in the folder or GGUF file, or of the hub id, `model`, and stores the engine in `*engine`.
///
/// `options_json` is null or an object with any of: `device`, `dtype`, `kv_cache_dtype`, `w8a8`, `check_ops`, `check_nan`, `threads`,
/// `model_base`, `mmproj`, `lora`, `preprocess`, `template`, `context_tokens`. They mean what the flags of the command line mean.
///
/// # Safety
/// `model` and `options_json` are null or C strings; `engine` is null or points to a pointer that may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llava_open(model: *const c_char, options_json: *const c_char, engine: *mut *mut LlavaEngine) -> i32 {
    guarded(|| {
        if engine.is_null() {
            return Err(Error::usage("engine is null"));
        }
        // SAFETY: not null, and writable by this function's contract.
        unsafe { engine.write(std::ptr::null_mut()) };
        // SAFETY: both are null or C strings by this function's contract.
        let (model, options) = unsafe { (optional_str(model, "model")?, optional_str(options_json, "options")?) };
        let model = model.ok_or_else(|| Error::usage("model is null"))?;
        let opened = Engine::open(model, &parse::<OpenRequest>(options, "options")?.options()?)?;
        let handle = Box::new(LlavaEngine { cancel: opened.cancel_flag(), engine: Mutex::new(opened) });
        // SAFETY: as above.
        unsafe { engine.write(Box::into_raw(handle)) };
        Ok(())
    })
}

/// Answers a prompt about images.
///
/// `request_json` is an object with either `prompt` (a question, put into the model's template) or `raw_prompt` (taken verbatim, with
/// `<image>` marks), and any of: `system`, `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `prompt_lookup`, `seed`,
/// `stop` (an array). `on_text` may be null. If `answer_json` is not null, the answer is stored there as text that
/// `llava_string_free` frees: an object with `text`, `finish_reason` (`stop`, `length` or `cancelled`), `token_ids`, `usage`, `timings`.
///
/// # Safety
/// `engine` came from `llava_open` and was not freed; `request_json` is null or a C string; `images` points to `n_images` images whose
/// bytes can be read; `answer_json` is null or may be written; `on_text` keeps the rules of its type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llava_generate(
    engine: *const LlavaEngine,
    request_json: *const c_char,
    images: *const LlavaImage,
    n_images: usize,
    on_text: LlavaOnText,
    user: *mut c_void,
    answer_json: *mut *mut c_char,
) -> i32 {
    guarded(|| {
        if !answer_json.is_null() {
            // SAFETY: not null, and writable by this function's contract.
            unsafe { answer_json.write(std::ptr::null_mut()) };
        }
        // SAFETY: null or a live engine by this function's contract.
        let handle = unsafe { engine.as_ref() }.ok_or_else(|| Error::usage("engine is null"))?;
        // SAFETY: null or a C string by this function's contract.
        let request = unsafe { optional_str(request_json, "request")? };
        let request = parse::<GenerateRequest>(request, "request")?;
        // SAFETY: `images` points to `n_images` readable images by this function's contract.
        let images = unsafe { decode_images(images, n_images)? };
        let mut engine = handle.engine.lock().map_err(|_| Error::usage("an earlier call failed inside this engine: free it"))?;
        let (prompt, options) = request.prompt(&engine, images.len())?;
        let answer = engine.generate(&prompt, &images, &options, &mut |text| match on_text {
            // SAFETY: `text` lives during the call; the rest is the callback's contract.
            Some(on_text) if unsafe { on_text(text.as_ptr().cast(), text.len(), user) } != 0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })?;
        if !answer_json.is_null() {
            let json = serde_json::to_string(&answer).map_err(|e| Error::Unsupported(e.to_string()))?;
            // JSON writes a zero byte as \u0000: there is none in it.
            let json = CString::new(json).map_err(|e| Error::Unsupported(e.to_string()))?;
            // SAFETY: not null, and writable by this function's contract.
            unsafe { answer_json.write(json.into_raw()) };
        }
        Ok(())
    })
}

/// # Safety
/// `images` points to `n_images` images, each with `n_bytes` readable bytes; neither is needed where the number is 0.
unsafe fn decode_images(images: *const LlavaImage, n_images: usize) -> Result<Vec<RgbImage>> {
    if n_images == 0 {
        return Ok(Vec::new());
    }
    if images.is_null() {
        return Err(Error::usage(format!("images is null, but there should be {n_images}")));
    }
    // SAFETY: not null, and that many by this function's contract.
    let images = unsafe { std::slice::from_raw_parts(images, n_images) };
    let decode_one = |(i, image): (usize, &LlavaImage)| {
        if image.bytes.is_null() {
            return Err(Error::usage(format!("bytes of image {i} are null")));
        }
        // SAFETY: not null, and that long by this function's contract.
        let bytes = unsafe { std::slice::from_raw_parts(image.bytes, image.n_bytes) };
        decode(bytes, &i.to_string(), &Limits::default())
    };
    images.iter().enumerate().map(decode_one).collect()
}

/// Ends the answer that `engine` is working on; what was said so far is returned by its call. May be called from any thread and from
/// the callback; does nothing when no answer is being made.
///
/// # Safety
/// `engine` is null, or came from `llava_open` and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llava_cancel(engine: *const LlavaEngine) {
    // SAFETY: null or a live engine by this function's contract.
    if let Some(handle) = unsafe { engine.as_ref() } {
        handle.cancel.store(true, Ordering::Relaxed);
    }
}

/// Frees a text that this library has given out; null is allowed.
///
/// # Safety
/// `text` is null, or was given out by this library and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llava_string_free(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: it came from `CString::into_raw` by this function's contract.
        drop(unsafe { CString::from_raw(text) });
    }
}

/// Closes a model; null is allowed. No other call on the engine may be running or follow.
///
/// # Safety
/// `engine` is null, or came from `llava_open` and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llava_free(engine: *mut LlavaEngine) {
    if !engine.is_null() {
        // SAFETY: it came from `Box::into_raw` by this function's contract. A panic in a destructor must not cross the border.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(engine) })));
    }
}
