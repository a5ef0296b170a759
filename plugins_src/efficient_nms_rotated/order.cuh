// From scores to candidates in order.  How many there are is known on the device only: kernels are launched for the
// most that there can be, and blocks without work return.
#pragma once

#include "gpu.h"
#include "problem.h"

namespace enr {

constexpr int kFilterThreads = 256, kFilterItems = 4;
constexpr int kSortThreads = kSortTile / 2;
constexpr int kRankThreads = 128;

struct FilterShared {
    int count, base;
};

// Scores to keys of those that pass: `keys` in any order, as sorting makes it one, and `counts`.
template <typename T>
__global__ void __launch_bounds__(kFilterThreads) filter(const T* scores, Problem problem, Workspace w) {
    FilterShared& block = shared<FilterShared>();
    const int image = blockIdx.y, lane = threadIdx.x % 32;
    const long long chunk = kFilterThreads * kFilterItems;
    scores += image * (long long)problem.pairs;
    for (long long start = blockIdx.x * chunk; start < problem.pairs; start += gridDim.x * chunk) {
        if (threadIdx.x == 0) block.count = 0;
        __syncthreads();
        uint64_t keys[kFilterItems];
        unsigned passing[kFilterItems];
        int total = 0;
#pragma unroll
        for (int item = 0; item < kFilterItems; ++item) {
            const long long index = start + item * kFilterThreads + threadIdx.x;
            float score = index < problem.pairs ? as_float(scores[index]) : NAN;
            bool passes = score > (problem.logits ? problem.least_logit : problem.score_threshold);
            if (passes && problem.logits) {
                score = sigmoid(score);
                passes = score > problem.score_threshold;
            }
            if (problem.background >= 0) passes = passes && int(uint32_t(index) % problem.classes) != problem.background;
            keys[item] = score_key(score, uint32_t(index));
            passing[item] = __ballot_sync(kWarp, passes);
            total += __popc(passing[item]);
        }
        int place = 0;
        if (lane == 0 && total) place = atomicAdd(&block.count, total);
        __syncthreads();
        if (threadIdx.x == 0 && block.count) block.base = atomicAdd(&w.counts[image], block.count);
        __syncthreads();
        place = __shfl_sync(kWarp, place, 0);
        uint64_t* to = w.keys + image * w.all + (total ? block.base : 0) + place;
#pragma unroll
        for (int item = 0; item < kFilterItems; ++item) {
            if (passing[item] >> lane & 1) to[__popc(passing[item] & lanes_below(lane))] = keys[item];
            to += __popc(passing[item]);
        }
        __syncthreads();
    }
}

struct SortShared {
    uint64_t keys[kSortTile];
};

// Sorts each tile of the first min(counts, most) keys of an image, filled up with kNoKey: bitonic, a pair a thread.
__global__ void __launch_bounds__(kSortThreads) sort_tiles(uint64_t* keys, const int* counts, int most, long long stride) {
    SortShared& block = shared<SortShared>();
    const int image = blockIdx.y, count = min(counts[image], most), thread = threadIdx.x;
    for (long long start = blockIdx.x * (long long)kSortTile; start < count; start += gridDim.x * (long long)kSortTile) {
        uint64_t* tile = keys + image * stride + start;
        for (int place = thread; place < kSortTile; place += kSortThreads)
            block.keys[place] = start + place < count ? tile[place] : kNoKey;
        __syncthreads();
        for (int run = 2; run <= kSortTile; run *= 2) {
            for (int step = run / 2; step > 0; step /= 2) {
                const int low = 2 * thread - (thread & (step - 1)), high = low + step;
                const uint64_t a = block.keys[low], b = block.keys[high];
                if ((a > b) == ((low & run) == 0)) block.keys[low] = b, block.keys[high] = a;
                // Steps of 32 and less stay among the 64 keys of a warp.
                if (step > 32 || (step == 1 && run > 32))
                    __syncthreads();
                else
                    __syncwarp();
            }
        }
        for (int place = thread; place < kSortTile; place += kSortThreads) tile[place] = block.keys[place];
        __syncthreads();
    }
}

// How many of the first `count` keys, sorted in tiles, are below `key`: its place in the order of all.
__device__ __forceinline__ int place_of(uint64_t key, const uint64_t* keys, int count) {
    constexpr int kAtOnce = 4;  // searches that wait for memory together
    const int tiles = (count + kSortTile - 1) / kSortTile;
    int place = 0;
    for (int first = 0; first < tiles; first += kAtOnce) {
        const uint64_t* tile[kAtOnce];
        int below[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            tile[i] = keys + (long long)min(first + i, tiles - 1) * kSortTile;
            below[i] = 0;
        }
#pragma unroll
        for (int step = kSortTile / 2; step; step /= 2)
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) below[i] += tile[i][below[i] + step - 1] < key ? step : 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (first + i < tiles) place += below[i] + (tile[i][below[i]] < key);
    }
    return place;
}

template <typename T>
__device__ __forceinline__ Box load_box(const T* boxes, long long index) {
    const T* box = boxes + index * 5;
    return {as_float(box[0]), as_float(box[1]), as_float(box[2]), as_float(box[3]), as_float(box[4])};
}

// Gives NMS a candidate.
template <typename T>
__device__ __forceinline__ void put(const T* boxes, const Problem& problem, const Workspace& w, int image, int place,
                                    int rank, uint64_t key) {
    const int box = index_of(key) / problem.classes;
    const int group = problem.grouped() ? index_of(key) % problem.classes : 0;
    const long long to = image * w.room + place;
    w.candidates[to] = {box, group, rank, 0};
    w.bounds[to] = bounds_of(load_box(boxes, image * (long long)problem.boxes + box));
}

// Tile by tile sorted score keys to ranks; the best go on: to NMS, or to be grouped by class.
template <typename T>
__global__ void __launch_bounds__(kRankThreads) rank_scores(const T* boxes, Problem problem, Workspace w) {
    const int image = blockIdx.y, count = w.counts[image];
    const uint64_t* keys = w.keys + image * w.all;
    for (long long i = blockIdx.x * (long long)kRankThreads + threadIdx.x; i < count;
         i += gridDim.x * (long long)kRankThreads) {
        const uint64_t key = keys[i];
        const int rank = place_of(key, keys, count);
        if (rank >= problem.limit) continue;
        w.ranked[image * w.room + rank] = key;
        if (problem.grouped())
            w.by_group[image * w.room + rank] = uint64_t(index_of(key) % problem.classes) << 32 | uint32_t(rank);
        else
            put(boxes, problem, w, image, rank, rank, key);
    }
}

// Tile by tile sorted (class, rank) to the order of NMS.
template <typename T>
__global__ void __launch_bounds__(kRankThreads) rank_groups(const T* boxes, Problem problem, Workspace w) {
    const int image = blockIdx.y, count = min(w.counts[image], problem.limit);
    const uint64_t* keys = w.by_group + image * w.room;
    for (long long i = blockIdx.x * (long long)kRankThreads + threadIdx.x; i < count;
         i += gridDim.x * (long long)kRankThreads) {
        const int rank = index_of(keys[i]);
        put(boxes, problem, w, image, place_of(keys[i], keys, count), rank, w.ranked[image * w.room + rank]);
    }
}

}  // namespace enr
