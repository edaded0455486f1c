/* Exercises every function of the C interface, well and badly. Usage: capi MODEL IMAGE [QUESTION EXPECTED_ANSWER] */
#include "llava_engine.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s failed; last error: %s\n", __FILE__, __LINE__, #condition, llava_last_error()); \
            exit(1); \
        } \
    } while (0)

struct heard {
    char text[4096];
    size_t n_bytes;
    size_t n_calls;
    size_t stop_after;
    llava_engine *cancel;
};

static int32_t on_text(const char *text, size_t n_bytes, void *user) {
    struct heard *heard = user;
    CHECK(heard->n_bytes + n_bytes < sizeof heard->text);
    memcpy(heard->text + heard->n_bytes, text, n_bytes);
    heard->n_bytes += n_bytes;
    heard->n_calls += 1;
    if (heard->cancel) llava_cancel(heard->cancel);
    return heard->stop_after && heard->n_calls == heard->stop_after;
}

static void *fail_elsewhere(void *unused) {
    (void)unused;
    llava_engine *engine;
    CHECK(strlen(llava_last_error()) == 0);
    CHECK(llava_open("/no/such/folder", NULL, &engine) == LLAVA_BAD_MODEL);
    CHECK(strstr(llava_last_error(), "/no/such/folder"));
    return NULL;
}

static unsigned char *read_file(const char *path, size_t *n_bytes) {
    FILE *file = fopen(path, "rb");
    CHECK(file);
    CHECK(fseek(file, 0, SEEK_END) == 0);
    *n_bytes = (size_t)ftell(file);
    rewind(file);
    unsigned char *bytes = malloc(*n_bytes);
    CHECK(bytes && fread(bytes, 1, *n_bytes, file) == *n_bytes);
    fclose(file);
    return bytes;
}

int main(int argc, char **argv) {
    CHECK(argc >= 3);
    const char *greedy = "{\"raw_prompt\": \"USER: <image>\\nhi ASSISTANT:\", \"temperature\": 0, \"max_new_tokens\": 12}";
    llava_engine *engine = NULL;
    char *answer = NULL;

    CHECK(llava_abi_version() == LLAVA_ABI_VERSION);
    CHECK(strlen(llava_version()) >= 5);
    CHECK(strlen(llava_last_error()) == 0);

    /* Null pointers, bad options, bad models: a status and words, never a crash. */
    CHECK(llava_open(NULL, NULL, &engine) == LLAVA_INVALID_ARGUMENT);
    CHECK(llava_open(argv[1], NULL, NULL) == LLAVA_INVALID_ARGUMENT);
    CHECK(llava_open("\xff\xfe", NULL, &engine) == LLAVA_INVALID_ARGUMENT && strstr(llava_last_error(), "UTF-8"));
    CHECK(llava_open(argv[1], "{\"no_such_option\": 1}", &engine) == LLAVA_INVALID_ARGUMENT && strstr(llava_last_error(), "no_such_option"));
    CHECK(llava_open(argv[1], "{\"device\": \"abacus\"}", &engine) == LLAVA_INVALID_ARGUMENT && strstr(llava_last_error(), "abacus"));
    CHECK(llava_open("/no/such/folder", NULL, &engine) == LLAVA_BAD_MODEL && engine == NULL);
    CHECK(llava_generate(NULL, greedy, NULL, 0, NULL, NULL, &answer) == LLAVA_INVALID_ARGUMENT && answer == NULL);
    llava_cancel(NULL);
    llava_free(NULL);
    llava_string_free(NULL);

    /* The last error belongs to a thread. */
    pthread_t thread;
    CHECK(llava_open(NULL, NULL, &engine) == LLAVA_INVALID_ARGUMENT);
    CHECK(pthread_create(&thread, NULL, fail_elsewhere, NULL) == 0 && pthread_join(thread, NULL) == 0);
    CHECK(strstr(llava_last_error(), "null"));

    CHECK(llava_open(argv[1], "{\"device\": \"cpu\", \"threads\": 2}", &engine) == LLAVA_OK && engine);
    size_t n_bytes;
    unsigned char *bytes = read_file(argv[2], &n_bytes);
    llava_image image = {bytes, n_bytes};

    /* A whole answer: what was streamed is what is in it. */
    struct heard heard = {0};
    CHECK(llava_generate(engine, greedy, &image, 1, on_text, &heard, &answer) == LLAVA_OK);
    CHECK(answer && strstr(answer, "\"finish_reason\"") && strstr(answer, "\"completion_tokens\""));
    llava_string_free(answer);
    CHECK(llava_generate(engine, greedy, &image, 1, NULL, NULL, NULL) == LLAVA_OK);

    /* The callback ends it; so does a cancel from within. */
    struct heard once = {.stop_after = 1};
    CHECK(llava_generate(engine, greedy, &image, 1, on_text, &once, &answer) == LLAVA_OK);
    CHECK(once.n_calls == 0 || strstr(answer, "\"cancelled\"") || once.n_calls == 1);
    llava_string_free(answer);
    struct heard cancelled = {.cancel = engine};
    CHECK(llava_generate(engine, greedy, &image, 1, on_text, &cancelled, &answer) == LLAVA_OK);
    llava_string_free(answer);

    /* Bad requests on a good engine, which goes on working. */
    llava_image broken = {bytes, n_bytes / 2}, text = {(const unsigned char *)"not an image", 12}, null_bytes = {NULL, 5};
    CHECK(llava_generate(engine, greedy, &broken, 1, NULL, NULL, NULL) == LLAVA_BAD_IMAGE);
    CHECK(llava_generate(engine, greedy, &text, 1, NULL, NULL, NULL) == LLAVA_BAD_IMAGE);
    CHECK(llava_generate(engine, greedy, &null_bytes, 1, NULL, NULL, NULL) == LLAVA_INVALID_ARGUMENT);
    CHECK(llava_generate(engine, greedy, NULL, 1, NULL, NULL, NULL) == LLAVA_INVALID_ARGUMENT);
    CHECK(llava_generate(engine, greedy, NULL, 0, NULL, NULL, NULL) == LLAVA_INVALID_ARGUMENT);
    CHECK(llava_generate(engine, "{", &image, 1, NULL, NULL, NULL) == LLAVA_INVALID_ARGUMENT);
    CHECK(llava_generate(engine, NULL, &image, 1, NULL, NULL, NULL) == LLAVA_INVALID_ARGUMENT);
    CHECK(llava_generate(engine, "{\"prompt\": \"a\", \"raw_prompt\": \"b\"}", &image, 1, NULL, NULL, NULL) == LLAVA_INVALID_ARGUMENT);
    CHECK(llava_generate(engine, "{\"prompt\": \"a\", \"temperature\": -1}", &image, 1, NULL, NULL, NULL) == LLAVA_INVALID_ARGUMENT);
    char *longest = malloc(200100);
    strcpy(longest, "{\"raw_prompt\": \"");
    size_t at = strlen(longest);
    for (int i = 0; i < 100000; i++) longest[at++] = 'x', longest[at++] = ' ';
    strcpy(longest + at, "\"}");
    CHECK(llava_generate(engine, longest, NULL, 0, NULL, NULL, NULL) == LLAVA_CONTEXT_FULL);
    free(longest);

    if (argc == 5) {
        char request[1024];
        snprintf(request, sizeof request, "{\"prompt\": \"%s\", \"temperature\": 0}", argv[3]);
        struct heard said = {0};
        CHECK(llava_generate(engine, request, &image, 1, on_text, &said, NULL) == LLAVA_OK);
        said.text[said.n_bytes] = 0;
        if (strcmp(said.text, argv[4]) != 0) {
            fprintf(stderr, "answered `%s`, expected `%s`\n", said.text, argv[4]);
            return 1;
        }
    }
    llava_free(engine);
    free(bytes);
    puts("capi: all checks passed");
    return 0;
}
