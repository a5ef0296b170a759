// The kept candidates, by rank, to the outputs.
#pragma once

#include "order.cuh"

namespace enr {

constexpr int kOutputThreads = 256, kOutputWarps = kOutputThreads / 32;

struct OutputShared {
    int sums[kOutputWarps];
};

// How many bits are set in words [0, end); of a whole block.
__device__ __forceinline__ int bits_before(const unsigned* words, int end, OutputShared& block) {
    int sum = 0;
    for (int i = threadIdx.x; i < end; i += kOutputThreads) sum += __popc(words[i]);
    sum = sum_of_warp(sum);
    __syncthreads();
    if (threadIdx.x % 32 == 0) block.sums[threadIdx.x / 32] = sum;
    __syncthreads();
    int total = 0;
    for (int i = 0; i < kOutputWarps; ++i) total += block.sums[i];
    return total;
}

template <typename T>
__global__ void __launch_bounds__(kOutputThreads)
    write_output(const T* boxes, Problem problem, Workspace w, int* num_detections, T* detection_boxes,
                 T* detection_scores, int* detection_classes) {
    OutputShared& block = shared<OutputShared>();
    const int image = blockIdx.y, most = problem.max_output;
    const int words = (min(w.counts[image], problem.limit) + 31) / 32;
    const unsigned* kept = w.kept + image * (long long)w.tiles;
    const uint64_t* ranked = w.ranked + image * w.room;
    boxes += image * (long long)problem.boxes * 5;
    detection_boxes += image * (long long)most * 5;
    detection_scores += image * (long long)most;
    detection_classes += image * (long long)most;

    const int total = bits_before(kept, words, block);
    if (blockIdx.x == 0 && threadIdx.x == 0) num_detections[image] = min(total, most);
    const int width = gridDim.x * kOutputThreads, thread = blockIdx.x * kOutputThreads + threadIdx.x;
    for (long long slot = total + (long long)thread; slot < most; slot += width) {
        for (int i = 0; i < 5; ++i) detection_boxes[slot * 5 + i] = from_float<T>(0);
        detection_scores[slot] = from_float<T>(0);
        detection_classes[slot] = -1;
    }
    for (int first = blockIdx.x * kOutputWarps; first < words; first += gridDim.x * kOutputWarps) {
        int slot = bits_before(kept, first, block);
        if (slot >= most) return;
        const int word = first + int(threadIdx.x / 32), lane = threadIdx.x % 32;
        if (word >= words || !(kept[word] >> lane & 1)) continue;
        for (int i = first; i < word; ++i) slot += __popc(kept[i]);
        slot += __popc(kept[word] & lanes_below(lane));
        if (slot >= most) continue;
        const uint64_t key = ranked[word * 32ll + lane];
        const int box = index_of(key) / problem.classes;
        for (int i = 0; i < 5; ++i) detection_boxes[slot * 5ll + i] = boxes[box * 5ll + i];
        detection_scores[slot] = from_float<T>(score_of(key));
        detection_classes[slot] = index_of(key) % problem.classes;
    }
}

}  // namespace enr
