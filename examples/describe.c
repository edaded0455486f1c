/* Describes a picture from a C program, as it goes.
 *
 *   cargo build --release
 *   cc -Iinclude examples/describe.c -Ltarget/release -lllava_engine -Wl,-rpath,target/release -o describe
 *   ./describe models/demo examples/scene.png "What is in this picture?"
 */
#include "llava_engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int32_t print(const char *text, size_t n_bytes, void *user) {
    (void)user;
    fwrite(text, 1, n_bytes, stdout);
    fflush(stdout);
    return 0; /* anything else would end the answer */
}

/* Copies `text` into `out` as the inside of a JSON string. */
static void escape(char *out, size_t size, const char *text) {
    size_t at = 0;
    for (; *text && at + 7 < size; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            out[at++] = '\\';
            out[at++] = (char)c;
        } else if (c < 0x20) {
            at += (size_t)snprintf(out + at, size - at, "\\u%04x", c);
        } else {
            out[at++] = (char)c;
        }
    }
    out[at] = 0;
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: describe MODEL IMAGE QUESTION\n");
        return 2;
    }
    if (llava_abi_version() != LLAVA_ABI_VERSION) {
        fprintf(stderr, "the library is another version than the header\n");
        return 1;
    }
    FILE *file = fopen(argv[2], "rb");
    if (!file) {
        perror(argv[2]);
        return 1;
    }
    static unsigned char bytes[20 << 20];
    llava_image image = {bytes, fread(bytes, 1, sizeof bytes, file)};
    fclose(file);

    llava_engine *engine;
    if (llava_open(argv[1], NULL, &engine) != LLAVA_OK) {
        fprintf(stderr, "%s\n", llava_last_error());
        return 1;
    }
    char question[4096], request[4200];
    escape(question, sizeof question, argv[3]);
    snprintf(request, sizeof request, "{\"prompt\": \"%s\", \"temperature\": 0}", question);
    int32_t status = llava_generate(engine, request, &image, 1, print, NULL, NULL);
    if (status != LLAVA_OK) fprintf(stderr, "%s\n", llava_last_error());
    putchar('\n');
    llava_free(engine);
    return status != LLAVA_OK;
}
