/* llava-engine: LLaVA in your own program. Generated from src/capi.rs by cbindgen; a test compares the two.
 *
 * Every function that can fail returns a status, LLAVA_OK or another; llava_last_error() says in words what the last failure of
 * this thread was. Functions may be called from any thread; calls on one engine wait for one another, except llava_cancel.
 *
 * Linking: -lllava_engine, or libllava_engine.a with -lstdc++ -lpthread -ldl -lm (the kernel simulator is C++; a library built with
 * LLAVA_SIM=off does without -lstdc++).
 */


#ifndef LLAVA_ENGINE_H
#define LLAVA_ENGINE_H

#include <stddef.h>
#include <stdint.h>

// Version of this interface: raised whenever a program compiled for the last one would not work with it.
#define LLAVA_ABI_VERSION 1

// It worked.
#define LLAVA_OK 0

// An argument, option or prompt that can never work; a null pointer where none may be.
#define LLAVA_INVALID_ARGUMENT 1

// The model's files are missing, malformed, or of another kind.
#define LLAVA_BAD_MODEL 2

// An image was refused or cannot be decoded.
#define LLAVA_BAD_IMAGE 3

// The prompt does not fit the model's context.
#define LLAVA_CONTEXT_FULL 4

// This build or this machine does not have what was asked for.
#define LLAVA_UNSUPPORTED 5

// A fault in the library itself: please report it. The engine it happened in must be freed.
#define LLAVA_INTERNAL 6

// The device failed: out of memory, or a kernel went wrong. The engine must be freed.
#define LLAVA_DEVICE 7

// An open model. Calls on one engine from several threads wait for one another; different engines are independent.
typedef struct llava_engine llava_engine;

// An image file's content: PNG, JPEG, WebP, GIF or BMP.
typedef struct {
  // First byte.
  const uint8_t *bytes;
  // Number of bytes.
  size_t n_bytes;
} llava_image;

// Called with each piece of an answer: `text` is UTF-8, `n_bytes` long and not ended by a zero byte, and valid during the call only.
// Returning anything but 0 ends the answer. It must not unwind, and must not call into the same engine except `llava_cancel`.
typedef int32_t (*llava_on_text)(const char *text, size_t n_bytes, void *user);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Version of the interface that the library has; compare it with the `LLAVA_ABI_VERSION` that you were compiled with.
uint32_t llava_abi_version(void);

// Version of the library, as text that is valid forever.
const char *llava_version(void);

// What the last call of this thread that failed had to say; empty before any. Valid until the next call of this thread.
const char *llava_last_error(void);

// Opens the model in the folder or GGUF file, or of the hub id, `model`, and stores the engine in `*engine`.
//
// `options_json` is null or an object with any of: `device`, `dtype`, `kv_cache_dtype`, `w8a8`, `check_ops`, `check_nan`, `threads`,
// `model_base`, `mmproj`, `lora`, `preprocess`, `template`, `context_tokens`. They mean what the flags of the command line mean.
//
// # Safety
// `model` and `options_json` are null or C strings; `engine` is null or points to a pointer that may be written.
int32_t llava_open(const char *model,
                   const char *options_json,
                   llava_engine **engine);

// Answers a prompt about images.
//
// `request_json` is an object with either `prompt` (a question, put into the model's template) or `raw_prompt` (taken verbatim, with
// `<image>` marks), and any of: `system`, `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `prompt_lookup`, `seed`,
// `stop` (an array). `on_text` may be null. If `answer_json` is not null, the answer is stored there as text that
// `llava_string_free` frees: an object with `text`, `finish_reason` (`stop`, `length` or `cancelled`), `token_ids`, `usage`, `timings`.
//
// # Safety
// `engine` came from `llava_open` and was not freed; `request_json` is null or a C string; `images` points to `n_images` images whose
// bytes can be read; `answer_json` is null or may be written; `on_text` keeps the rules of its type.
int32_t llava_generate(const llava_engine *engine,
                       const char *request_json,
                       const llava_image *images,
                       size_t n_images,
                       llava_on_text on_text,
                       void *user,
                       char **answer_json);

// Ends the answer that `engine` is working on; what was said so far is returned by its call. May be called from any thread and from
// the callback; does nothing when no answer is being made.
//
// # Safety
// `engine` is null, or came from `llava_open` and was not freed.
void llava_cancel(const llava_engine *engine);

// Frees a text that this library has given out; null is allowed.
//
// # Safety
// `text` is null, or was given out by this library and not freed.
void llava_string_free(char *text);

// Closes a model; null is allowed. No other call on the engine may be running or follow.
//
// # Safety
// `engine` is null, or came from `llava_open` and was not freed.
void llava_free(llava_engine *engine);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LLAVA_ENGINE_H */
