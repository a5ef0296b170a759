// Runs CUDA kernels on the CPU: a thread is a coroutine, barriers and warp functions wait for each other.
//
// As many blocks as `emulator().blocks_at_once` run side by side, a thread of any of them at a time, in an order drawn
// from `emulator().seed`, so that kernels whose blocks wait for each other can be tried in many interleavings.  Warp
// functions must be reached by all 32 lanes; one that is reached by some only, or a barrier that never fills, ends the
// program with a message.  It checks no memory accesses: AddressSanitizer and compute-sanitizer do.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };

inline const char* cudaGetErrorString(cudaError_t) { return "CUDA error"; }

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    std::memset(memory, value, bytes);
    return cudaSuccess;
}

using std::max;
using std::min;

namespace enr {

[[noreturn]] inline void emulator_fault(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::abort();
}

enum class Wait { nothing, block, warp };

struct EmulatedThread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 thread, block;
    int kind = 0;  // of the warp function that it is in
    uint64_t given = 0;
    int index = 0;
    Wait wait = Wait::nothing;
    bool done = false;
};

struct EmulatedBlock {
    std::vector<EmulatedThread> threads;
    std::unique_ptr<char[]> shared;
    int running = 0, at_barrier = 0;
    std::vector<int> in_warp;                         // lanes of each warp that are in a warp function
    std::vector<std::array<uint64_t, 32>> exchanged;  // what they gave
};

struct Emulator {
    int blocks_at_once = 4;
    uint64_t seed = 0;
    ucontext_t main;
    EmulatedThread* thread = nullptr;
    EmulatedBlock* block = nullptr;
    dim3 block_dim, grid_dim;
    std::function<void()> body;

    static constexpr size_t kStack = 64 << 10, kShared = 228 << 10;

    void yield() { swapcontext(&thread->context, &main); }

    static void enter();

    void start(EmulatedBlock& blk, int index) {
        const int count = int(block_dim.x);
        if (blk.threads.empty()) {
            blk.threads = std::vector<EmulatedThread>(count);
            blk.shared.reset(new char[kShared]);
            for (auto& each : blk.threads) each.stack.reset(new char[kStack]);
        }
        // Shared memory begins with anything.
        std::memset(blk.shared.get(), 0xa5, kShared);
        blk.running = count, blk.at_barrier = 0;
        blk.in_warp.assign((count + 31) / 32, 0);
        blk.exchanged.resize((count + 31) / 32);
        for (int i = 0; i < count; ++i) {
            EmulatedThread& each = blk.threads[i];
            each.thread = dim3(i), each.index = i, each.wait = Wait::nothing, each.done = false;
            each.block = dim3(index % grid_dim.x, index / grid_dim.x);
            getcontext(&each.context);
            each.context.uc_stack.ss_sp = each.stack.get();
            each.context.uc_stack.ss_size = kStack;
            each.context.uc_link = &main;
            makecontext(&each.context, &Emulator::enter, 0);
        }
    }

    void run(dim3 grid, int threads) {
        if (threads % 32) emulator_fault("a block is whole warps");
        grid_dim = grid, block_dim = dim3(threads);
        const int total = int(grid.x * grid.y), width = std::min(std::max(blocks_at_once, 1), total);
        std::vector<EmulatedBlock> blocks(width);
        int next = 0;
        for (auto& each : blocks) start(each, next++);
        std::mt19937_64 random(seed);
        std::vector<int> order(width);
        for (int i = 0; i < width; ++i) order[i] = i;
        for (int finished = 0, idle = 0; finished < total;) {
            bool moved = false;
            std::shuffle(order.begin(), order.end(), random);
            for (int i : order) {
                EmulatedBlock& each = blocks[i];
                if (!each.running) continue;
                moved |= turn(each, random);
                if (!each.running) {
                    ++finished;
                    if (next < total) start(each, next++);
                }
            }
            idle = moved ? 0 : idle + 1;
            if (idle > 2) emulator_fault("all threads wait");
        }
    }

    // Lets the threads of a block that can run do so, some of its warps at a time; whether one did.
    bool turn(EmulatedBlock& each, std::mt19937_64& random) {
        bool moved = false;
        block = &each;
        const int warps = int(each.threads.size() / 32), first = int(random() % warps);
        const uint64_t held = random();
        for (int w = 0; w < warps; ++w) {
            // Some warps are behind others.
            if (each.running > 32 && (held >> w % 64 & 3) == 3) {
                moved = true;
                continue;
            }
            for (int lane = 0; lane < 32; ++lane) {
                EmulatedThread& it = each.threads[(first + w) % warps * 32 + lane];
                if (it.done || it.wait != Wait::nothing) continue;
                thread = &it;
                moved = true;
                swapcontext(&main, &it.context);
            }
        }
        return moved;
    }

    void barrier() {
        if (++block->at_barrier < block->running) {
            thread->wait = Wait::block;
            while (thread->wait != Wait::nothing) yield();
            return;
        }
        release_barrier();
    }

    void release_barrier() {
        block->at_barrier = 0;
        for (auto& each : block->threads)
            if (each.wait == Wait::block) each.wait = Wait::nothing;
    }

    // Hands in a value, waits for the other 31 lanes; returns what each handed in.
    std::array<uint64_t, 32> exchange(int kind, uint64_t value) {
        EmulatedThread* self = thread;
        EmulatedBlock* home = block;
        const int warp = self->index / 32;
        self->kind = kind, self->given = value;
        if (++home->in_warp[warp] < 32) {
            self->wait = Wait::warp;
            while (self->wait != Wait::nothing) yield();
            return home->exchanged[warp];
        }
        home->in_warp[warp] = 0;
        for (int lane = 0; lane < 32; ++lane) {
            EmulatedThread& each = home->threads[warp * 32 + lane];
            if (each.done || each.kind != kind) emulator_fault("lanes of a warp are in different warp functions");
            home->exchanged[warp][lane] = each.given;
            each.wait = Wait::nothing;
        }
        return home->exchanged[warp];
    }
};

inline Emulator& emulator() {
    static Emulator one;
    return one;
}

inline void Emulator::enter() {
    Emulator& self = emulator();
    self.body();
    self.thread->done = true;
    if (--self.block->running && self.block->at_barrier == self.block->running) self.release_barrier();
    // uc_link leads back to run.
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, cudaStream_t, Arguments... arguments) {
    emulator().body = [=] { kernel(arguments...); };
    emulator().run(blocks, threads);
    return cudaSuccess;
}

template <typename T>
T& shared() {
    static_assert(sizeof(T) <= Emulator::kShared, "");
    return *reinterpret_cast<T*>(emulator().block->shared.get());
}

inline void pause() { emulator().yield(); }

}  // namespace enr

#define threadIdx (::enr::emulator().thread->thread)
#define blockIdx (::enr::emulator().thread->block)
#define blockDim (::enr::emulator().block_dim)
#define gridDim (::enr::emulator().grid_dim)

inline void __syncthreads() { ::enr::emulator().barrier(); }
inline void __syncwarp() { ::enr::emulator().exchange(1, 0); }

inline unsigned __ballot_sync(unsigned, bool vote) {
    const auto votes = ::enr::emulator().exchange(2, vote);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned(votes[lane]) << lane;
    return bits;
}

template <typename T>
T emulated_shuffle(int kind, T value, int from) {
    uint64_t given = 0;
    std::memcpy(&given, &value, sizeof value);
    const auto all = ::enr::emulator().exchange(kind, given);
    std::memcpy(&value, &all[from], sizeof value);
    return value;
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return emulated_shuffle(3, value, from);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulated_shuffle(4, value, int(threadIdx.x % 32) ^ mask);
}

template <typename T>
T atomicAdd(T* to, T value) {
    const T old = *to;
    *to = old + value;
    return old;
}

template <typename T>
T atomicOr(T* to, T value) {
    const T old = *to;
    *to = old | value;
    return old;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
