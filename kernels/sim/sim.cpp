// The runtime under sim.h: whose turn it is, barriers, warp collectives, and the check of every memory access.
//
// One Block lives on one thread of the operating system and runs one block of a grid at a time. The caller resumes coroutines in the order
// that llava_sim_next gives; all state is the Block's, so nothing here is locked except the table of allocations.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "mma.h"
#include "sim.h"

using sim::Collective;
using sim::Site;

namespace {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
// Shared memory of a block on the largest GPU that kernels are written for (sm_90).
constexpr size_t SHARED_BYTES = 227 << 10;
// Bytes beside each allocation whose use is noticed: rows that a tile has beyond its matrix. Nobody touches them, so they cost no memory.
constexpr size_t RED_ZONE = 1 << 20;

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int bytes;
    int group;
};

enum class State { Ready, InCollective, AtBarrier, Exited };

// One CUDA thread.
struct Thread {
    unsigned number;
    dim3 index;
    State state;
    Site site;
    // What it brought to the collective that it waits in.
    Collective kind;
    unsigned mask;
    int parameter;
    const void* in;
    void* out;
    // cp.async: copies under way, the group that the next belongs to, and the first that has not been waited for.
    std::vector<Copy> copies;
    int group, first_group;
    // Its stack, which it may use as it likes.
    uintptr_t stack_low, stack_high;
    bool waited;  // for the launch before its own: until then that may still read and write all but constants
};

// Who touched two bytes of shared memory last, and when. Times never begin again, so cells need not be cleared between blocks.
struct Cell {
    uint32_t write_time, write_warp_time, read_time, read_warp_time;
    uint32_t copy_time;  // when the cp.async to it began that nobody has waited for yet; before the block's begin_time: there is none
    uint16_t writer, reader;
};
constexpr uint16_t SEVERAL_LANES = 0x8000;  // with the first of their numbers: readers of one warp
constexpr uint16_t SEVERAL_WARPS = 0xffff;

struct Range {
    uintptr_t low, high;
};

struct Block {
    const char* kernel = "";
    dim3 grid{}, size{}, index{};
    unsigned n_threads = 0, n_left = 0, current = 0;
    size_t shared_bytes = 0;
    std::vector<Thread> threads{MAX_THREADS};
    unsigned char* shared = nullptr;
    std::vector<Cell> cells{SHARED_BYTES / 2};
    uint32_t time = 1;                           // counts barriers of the block
    uint32_t begin_time = 1;
    uint32_t warp_time[MAX_THREADS / WARP] = {}; // counts __syncwarp of a warp
    Range recent[4] = {};                        // allocations found last
    unsigned next_recent = 0;
    std::string error;
};

thread_local Block* block = nullptr;
thread_local Thread* self = nullptr;
void (*suspend)() = nullptr;

// Allocations by address, red zones left out.
std::shared_mutex allocations_lock;
std::map<uintptr_t, size_t> allocations;

struct KernelEntry {
    const char* name;
    sim::Invoke invoke;
    const char* signature;
};

std::vector<KernelEntry>& kernels() {
    static std::vector<KernelEntry> all;
    return all;
}

const char* file_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// Ends the launch: remembers what is wrong, and never comes back to the thread that runs.
void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (block->error.empty()) {
        char where[160] = "";
        if (self)
            std::snprintf(where, sizeof where, " (block %u,%u,%u, thread %u,%u,%u)", block->index.x, block->index.y, block->index.z,
                          self->index.x, self->index.y, self->index.z);
        block->error = std::string(text) + where;
    }
    if (self)
        for (;;) suspend();
}

// ---------------------------------------------------------------- memory

unsigned warp_of(unsigned thread) { return thread / WARP; }

// Whether an access by `thread` now may meet one by `other` at that time: no barrier of the block lies between, nor, in one warp, a
// __syncwarp.
bool concurrent(unsigned other, uint32_t time, uint32_t warp_time, unsigned thread) {
    return time == block->time && other != thread && (warp_of(other) != warp_of(thread) || warp_time == block->warp_time[warp_of(thread)]);
}

void note_shared(uintptr_t offset, size_t bytes, bool write) {
    const unsigned me = self->number;
    const uint32_t now = block->time, warp_now = block->warp_time[warp_of(me)];
    for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
        Cell& cell = block->cells[i];
        if (cell.copy_time >= block->begin_time)
            fail("race in shared memory: byte %zu is %s by thread %u while a cp.async to it is under way: no wait lies between", i * 2,
                 write ? "written" : "read", me);
        if (concurrent(cell.writer, cell.write_time, cell.write_warp_time, me))
            fail("race in shared memory: byte %zu is %s by thread %u and was written by thread %u with no barrier between", i * 2,
                 write ? "written" : "read", me, unsigned(cell.writer));
        const bool read_now = cell.read_time == now;
        if (write) {
            bool meets = false;
            unsigned other = cell.reader;
            if (read_now && cell.reader == SEVERAL_WARPS) {
                meets = true;
            } else if (read_now && (cell.reader & SEVERAL_LANES)) {
                other = cell.reader & ~SEVERAL_LANES;
                meets = warp_of(other) != warp_of(me) || cell.read_warp_time == warp_now;
            } else {
                meets = concurrent(cell.reader, cell.read_time, cell.read_warp_time, me);
            }
            if (meets)
                fail("race in shared memory: byte %zu is written by thread %u and was read by %s with no barrier between", i * 2, me,
                     cell.reader == SEVERAL_WARPS ? "others" : ("thread " + std::to_string(other)).c_str());
            cell.writer = uint16_t(me);
            cell.write_time = now;
            cell.write_warp_time = warp_now;
        } else if (!read_now) {
            cell.reader = uint16_t(me);
            cell.read_time = now;
            cell.read_warp_time = warp_now;
        } else if (cell.reader != SEVERAL_WARPS) {
            const unsigned first = cell.reader & ~SEVERAL_LANES;
            if (warp_of(first) != warp_of(me)) cell.reader = SEVERAL_WARPS;
            else if (cell.read_warp_time != warp_now) cell.reader = uint16_t(me);
            else if (first != me) cell.reader = uint16_t(first | SEVERAL_LANES);
            cell.read_warp_time = warp_now;
        }
    }
}

// Finds the allocation that an address lies in or beside.
bool find_allocation(uintptr_t address, Range& found, bool& inside) {
    std::shared_lock guard(allocations_lock);
    auto next = allocations.upper_bound(address + RED_ZONE);
    while (next != allocations.begin()) {
        --next;
        const uintptr_t low = next->first, high = low + next->second;
        if (address >= low && address < high) {
            found = {low, high};
            inside = true;
            return true;
        }
        if (address + RED_ZONE >= low && address < high + RED_ZONE) {
            found = {low, high};
            inside = false;
            return true;
        }
        if (address >= high + RED_ZONE) return false;
    }
    return false;
}

void note_access(const void* pointer, size_t bytes, bool write) {
    if (!self) return;
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (address >= self->stack_low && address < self->stack_high) return;
    sim::expect_aligned(pointer, bytes > 16 ? 16 : bytes & -bytes);
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(block->shared);
    if (offset < SHARED_BYTES + RED_ZONE) {
        if (offset + bytes > block->shared_bytes)
            fail("%s out of bounds: bytes %zu..%zu of shared memory, the launch gave %zu", write ? "write" : "read", size_t(offset),
                 size_t(offset + bytes), block->shared_bytes);
        note_shared(offset, bytes, write);
        return;
    }
    const auto expect_waited = [&] {
        if (!self->waited) fail("%s of global memory before wait_for_previous()", write ? "write" : "read");
    };
    for (const Range& range : block->recent)
        if (address >= range.low && address + bytes <= range.high) return expect_waited();
    Range found;
    bool inside;
    if (!find_allocation(address, found, inside)) {
        // To be read there are the kernel's constants and arguments; to be written, nothing.
        if (write) fail("write out of bounds: %zu bytes that are not the device's", bytes);
        return;
    }
    if (!inside || address + bytes > found.high)
        fail("%s out of bounds: %zu bytes at %+lld of an allocation of %zu bytes", write ? "write" : "read", bytes,
             static_cast<long long>(address - found.low), size_t(found.high - found.low));
    block->recent[block->next_recent++ % 4] = found;
    expect_waited();
}

// ---------------------------------------------------------------- collectives

// What each lane of a product on tensor cores gives and gets.
sim::MmaOperands operands(Thread* lanes) {
    sim::MmaOperands all;
    for (unsigned lane = 0; lane < WARP; ++lane) all.in[lane] = lanes[lane].in, all.out[lane] = lanes[lane].out;
    return all;
}

// Each lane i names row i % 8 of matrix i / 8 (8 x 8 of 16 bits); register j of a lane gets two elements of matrix j.
void load_matrices(Thread* lanes, int n_matrices, bool transposed) {
    for (int matrix = 0; matrix < n_matrices; ++matrix) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row) {
            Thread& owner = lanes[matrix * 8 + row];
            const unsigned char* address = *static_cast<unsigned char* const*>(owner.in);
            Thread* caller = self;
            self = &owner;
            note_access(address, 16, false);
            self = caller;
            std::memcpy(element[row], address, 16);
        }
        for (unsigned lane = 0; lane < WARP; ++lane) {
            const unsigned row = lane / 4, column = lane % 4 * 2;
            const uint32_t low = transposed ? element[column][row] : element[row][column];
            const uint32_t high = transposed ? element[column + 1][row] : element[row][column + 1];
            static_cast<uint32_t*>(lanes[lane].out)[matrix] = low | high << 16;
        }
    }
}

void shuffle(Thread* lanes, unsigned mask, Collective kind) {
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const int parameter = lanes[lane].parameter;
        unsigned source = lane;
        switch (kind) {
            case Collective::Shfl: source = unsigned(parameter) % WARP; break;
            case Collective::ShflXor: source = lane ^ unsigned(parameter); break;
            case Collective::ShflDown: source = lane + unsigned(parameter) < WARP ? lane + unsigned(parameter) : lane; break;
            default: source = lane >= unsigned(parameter) ? lane - unsigned(parameter) : lane; break;
        }
        if (!(mask >> source & 1)) fail("lane %u shuffles from lane %u, which is not in the mask %08x", lane, source, mask);
        std::memcpy(lanes[lane].out, lanes[source].in, 4);
    }
}

void complete(Thread* lanes, unsigned mask, Collective kind) {
    switch (kind) {
        case Collective::Sync: ++block->warp_time[warp_of(lanes[0].number)]; break;
        case Collective::Ballot: {
            unsigned votes = 0;
            for (unsigned lane = 0; lane < WARP; ++lane)
                if (mask >> lane & 1) votes |= (*static_cast<const unsigned*>(lanes[lane].in) & 1) << lane;
            for (unsigned lane = 0; lane < WARP; ++lane)
                if (mask >> lane & 1) *static_cast<unsigned*>(lanes[lane].out) = votes;
            break;
        }
        case Collective::LdMatrix: load_matrices(lanes, self->parameter, false); break;
        case Collective::LdMatrixTrans: load_matrices(lanes, self->parameter, true); break;
        case Collective::Mma: sim::mma_m16n8k16(operands(lanes), self->parameter != 0); break;
        case Collective::MmaS8: sim::mma_m16n8k32_s8(operands(lanes)); break;
        default: shuffle(lanes, mask, kind); break;
    }
}

bool same_site(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

}  // namespace

namespace sim {

dim3 thread_index() { return self->index; }
dim3 block_index() { return block->index; }
dim3 block_size() { return block->size; }
dim3 grid_size() { return block->grid; }
unsigned char* shared_memory() { return block->shared; }

void collective(Collective kind, unsigned mask, const void* in, void* out, int parameter, Site site) {
    Thread* me = self;
    Thread* lanes = &block->threads[me->number / WARP * WARP];
    const unsigned lane = me->number % WARP;
    if (!(mask >> lane & 1)) fail("%s:%d: a lane calls a collective that its mask %08x leaves out", file_name(site.file), site.line, mask);
    me->state = State::InCollective;
    me->site = site;
    me->kind = kind;
    me->mask = mask;
    me->in = in;
    me->out = out;
    me->parameter = parameter;
    for (unsigned i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        const Thread& other = lanes[i];
        if (other.number >= block->n_threads || other.state == State::Exited)
            fail("%s:%d: lane %u has returned, or does not exist, but is in the mask of a collective", file_name(site.file), site.line, i);
        if (other.state != State::InCollective) {
            suspend();  // the last to come sets our state and results
            return;
        }
        if (other.kind != kind || other.mask != mask || !same_site(other.site, site))
            fail("divergent warp: lane %u is in the collective of %s:%d, lane %u in that of %s:%d", lane, file_name(site.file), site.line, i,
                 file_name(other.site.file), other.site.line);
    }
    complete(lanes, mask, kind);
    for (unsigned i = 0; i < WARP; ++i)
        if (mask >> i & 1) lanes[i].state = State::Ready;
}

void sync_threads(Site site) {
    self->state = State::AtBarrier;
    self->site = site;
    suspend();
}

void expect_aligned(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("access to %zu bytes at an address that is no multiple of them", bytes);
}

void wait_for_previous() { self->waited = true; }

void read_constant(void* to, const void* from, size_t bytes) {
    const bool waited = std::exchange(self->waited, true);
    note_access(from, bytes, false);
    self->waited = waited;
    std::memcpy(to, from, bytes);
}

void trap(const char* message, Site site) { fail("%s:%d: %s", file_name(site.file), site.line, message); }

// Sets or ends, for the 16 bytes that a copy goes to, that it is under way.
static void mark_copy(const void* shared, uint32_t time) {
    const size_t first = size_t(static_cast<const unsigned char*>(shared) - block->shared) / 2;
    for (size_t i = first; i < first + 8; ++i) block->cells[i].copy_time = time;
}

// The copy may land at any time from now until it is waited for: others must be done with the place now, and the data is there only then.
void async_copy_16(void* shared, const void* global, int valid_bytes) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || reinterpret_cast<uintptr_t>(shared) % 16 != 0)
        fail("cp.async of 16 bytes from or to an address that is no multiple of 16");
    if (valid_bytes < 0 || valid_bytes > 16) fail("cp.async of %d bytes of 16", valid_bytes);
    if (reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(block->shared) >= SHARED_BYTES + RED_ZONE)
        fail("cp.async to an address that is not in shared memory");
    note_access(shared, 16, true);
    if (valid_bytes > 0) {
        note_access(global, 1, false);
        note_access(static_cast<const char*>(global) + valid_bytes - 1, 1, false);
    }
    mark_copy(shared, block->time);
    self->copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), valid_bytes, self->group});
}

void async_commit() { ++self->group; }

void async_wait(int groups_left) {
    const int first = self->group - groups_left;
    auto& copies = self->copies;
    size_t kept = 0;
    for (const Copy& copy : copies) {
        if (copy.group >= first) {
            copies[kept++] = copy;
            continue;
        }
        mark_copy(copy.to, 0);
        note_access(copy.to, 16, true);
        std::memcpy(copy.to, copy.from, size_t(copy.bytes));
        std::memset(copy.to + copy.bytes, 0, size_t(16 - copy.bytes));
    }
    copies.resize(kept);
}

template <typename T> T checked_add(T* p, T x) {
    note_access(p, 1, true);  // atomics do not race with each other: only bounds are checked
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, T(old + x), true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
    return old;
}
int atomic_add(int* p, int x) { return checked_add(p, x); }
unsigned atomic_add(unsigned* p, unsigned x) { return checked_add(p, x); }

void add_kernel(const char* name, Invoke invoke, const char* signature) { kernels().push_back({name, invoke, signature}); }

}  // namespace sim

// ---------------------------------------------------------------- what simulator.rs calls

extern "C" {

void llava_sim_init(void (*suspend_function)()) { suspend = suspend_function; }

size_t llava_sim_n_kernels() { return kernels().size(); }
const char* llava_sim_kernel_name(size_t i) { return kernels()[i].name; }
// One letter for each argument: p pointer, f float, i int, u unsigned, l 64 bits.
const char* llava_sim_kernel_signature(size_t i) { return kernels()[i].signature; }
void llava_sim_invoke(size_t i, void** arguments) { kernels()[i].invoke(arguments); }

// Memory whose bytes are all ones (no number in any float format), 256-byte aligned; null if there is none.
void* llava_sim_alloc(size_t bytes) {
    const size_t whole = (bytes + 2 * RED_ZONE + 255) / 256 * 256;
    unsigned char* base = static_cast<unsigned char*>(std::aligned_alloc(4096, (whole + 4095) / 4096 * 4096));
    if (!base) return nullptr;
    std::memset(base + RED_ZONE, 0xff, bytes);
    std::unique_lock guard(allocations_lock);
    allocations[reinterpret_cast<uintptr_t>(base) + RED_ZONE] = bytes;
    return base + RED_ZONE;
}

void llava_sim_free(void* pointer) {
    {
        std::unique_lock guard(allocations_lock);
        allocations.erase(reinterpret_cast<uintptr_t>(pointer));
    }
    std::free(static_cast<unsigned char*>(pointer) - RED_ZONE);
}

Block* llava_sim_block_new() {
    Block* b = new Block;
    b->shared = static_cast<unsigned char*>(std::aligned_alloc(4096, (SHARED_BYTES + RED_ZONE + 4095) / 4096 * 4096));
    return b;
}

void llava_sim_block_free(Block* b) {
    std::free(b->shared);
    delete b;
}

size_t llava_sim_max_shared() { return SHARED_BYTES; }

// Makes `b` ready for block `index` of a grid, on this thread.
void llava_sim_begin(Block* b, const char* kernel, const dim3* grid, const dim3* size, const dim3* index, size_t shared_bytes) {
    block = b;
    self = nullptr;
    b->kernel = kernel;
    b->grid = *grid;
    b->size = *size;
    b->index = *index;
    b->n_threads = b->n_left = size->x * size->y * size->z;
    b->current = 0;
    b->shared_bytes = shared_bytes;
    b->error.clear();
    b->begin_time = ++b->time;
    for (Range& range : b->recent) range = {};
    std::memset(b->shared, 0xff, shared_bytes);
    for (unsigned i = 0; i < (b->n_threads + WARP - 1) / WARP * WARP; ++i) {
        Thread& thread = b->threads[i];
        thread.number = i;
        thread.index = {i % size->x, i / size->x % size->y, i / size->x / size->y};
        thread.state = i < b->n_threads ? State::Ready : State::Exited;
        thread.copies.clear();
        thread.group = 0;
        thread.waited = false;
    }
}

// The thread whose turn it is; -1 when all have returned, -2 when something is wrong.
long llava_sim_next(Block* b) {
    block = b;
    self = nullptr;  // what is wrong from here on is no one thread's fault
    if (!b->error.empty()) return -2;
    if (b->n_left == 0) return -1;
    for (int round = 0; round < 2; ++round) {
        for (unsigned i = 0; i < b->n_threads; ++i) {
            const unsigned candidate = b->current + i < b->n_threads ? b->current + i : b->current + i - b->n_threads;
            if (b->threads[candidate].state == State::Ready) {
                b->current = candidate;
                return candidate;
            }
        }
        // Nobody can go on: all who are left must be at one barrier.
        const Thread* first = nullptr;
        for (unsigned i = 0; i < b->n_threads; ++i) {
            const Thread& thread = b->threads[i];
            if (thread.state == State::Exited) continue;
            if (thread.state == State::InCollective) {
                fail("deadlock: thread %u waits in the warp collective of %s:%d, which not all of its lanes reach", thread.number,
                     file_name(thread.site.file), thread.site.line);
                return -2;
            }
            if (!first) first = &thread;
            else if (!same_site(first->site, thread.site)) {
                fail("divergent __syncthreads: thread %u is at %s:%d, thread %u at %s:%d", first->number, file_name(first->site.file),
                     first->site.line, thread.number, file_name(thread.site.file), thread.site.line);
                return -2;
            }
        }
        if (b->n_left != b->n_threads) {
            fail("divergent __syncthreads: %u of %u threads have returned before %s:%d", b->n_threads - b->n_left, b->n_threads,
                 file_name(first->site.file), first->site.line);
            return -2;
        }
        for (unsigned i = 0; i < b->n_threads; ++i) b->threads[i].state = State::Ready;
        ++b->time;
        b->current = 0;
    }
    return -2;  // unreachable: after a barrier all are ready
}

// Makes thread `number` the one that runs, with its stack.
void llava_sim_enter(Block* b, unsigned number, size_t stack_low, size_t stack_high) {
    block = b;
    self = &b->threads[number];
    self->stack_low = stack_low;
    self->stack_high = stack_high;
}

// The thread that runs has returned from the kernel.
void llava_sim_exit(Block* b) {
    self->state = State::Exited;
    --b->n_left;
}

const char* llava_sim_error(Block* b) { return b->error.c_str(); }

// ---------------------------------------------------------------- the hooks that -fsanitize=thread calls

#define HOOK(bytes)                                                                    \
    void __tsan_read##bytes(void* p) { note_access(p, bytes, false); }                 \
    void __tsan_write##bytes(void* p) { note_access(p, bytes, true); }                 \
    void __tsan_unaligned_read##bytes(void* p) { note_access(p, bytes, false); }       \
    void __tsan_unaligned_write##bytes(void* p) { note_access(p, bytes, true); }       \
    void __tsan_volatile_read##bytes(void* p) { note_access(p, bytes, false); }        \
    void __tsan_volatile_write##bytes(void* p) { note_access(p, bytes, true); }
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
void __tsan_read_range(void* p, size_t bytes) { note_access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { note_access(p, bytes, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
