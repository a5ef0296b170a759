// The plain pairwise algorithm, as deployed code has it: a bit for every pair of candidates, then one block that goes
// through them in order.  Candidates, their order, the IoU and the output are those of the product, so that only the
// way of suppressing is compared.  The number of candidates is known on the host, as it is there.
#pragma once

#include "../order.cuh"
#include "../output.cuh"

namespace enr {

constexpr int kRow = 64;  // candidates of a block, and bits of a word
constexpr int kSweepThreads = 1024;

// Whether candidate i suppresses each of 64 later ones: mask [batch, count, words].
template <typename T>
__global__ void __launch_bounds__(kRow) pair_masks(const T* boxes, Problem problem, Workspace w, int count,
                                                   bool by_class, uint64_t* mask) {
    __shared__ Box others[kRow];
    __shared__ int other_labels[kRow];
    const int row = blockIdx.y, column = blockIdx.x, image = blockIdx.z, words = gridDim.x;
    if (row > column) return;
    auto load = [&](int place, Box& box, int& label) {
        const uint64_t key = w.ranked[image * w.room + place];
        box = load_box(boxes, image * (long long)problem.boxes + index_of(key) / problem.classes);
        label = by_class ? index_of(key) % problem.classes : 0;
    };
    const int other = column * kRow + threadIdx.x, own = row * kRow + threadIdx.x;
    if (other < count) load(other, others[threadIdx.x], other_labels[threadIdx.x]);
    __syncthreads();
    if (own >= count) return;
    Box box;
    int label;
    load(own, box, label);
    uint64_t bits = 0;
    for (int i = row == column ? threadIdx.x + 1 : 0; i < min(count - column * kRow, kRow); ++i)
        if (other_labels[i] == label && !overlaps_nothing(box) && !overlaps_nothing(others[i]) &&
            suppresses(box, others[i], problem.iou_threshold))
            bits |= uint64_t(1) << i;
    mask[(image * (long long)count + own) * words + column] = bits;
}

// One block an image goes through the candidates in order.
__global__ void __launch_bounds__(kSweepThreads) sweep(Workspace w, int count, int words, const uint64_t* mask) {
    extern __shared__ uint64_t gone[];
    const int image = blockIdx.x;
    for (int i = threadIdx.x; i < words; i += kSweepThreads) gone[i] = 0;
    __syncthreads();
    unsigned* kept = w.kept + image * (long long)w.tiles;
    mask += image * (long long)count * words;
    for (int own = 0; own < count; ++own) {
        const bool stays = !(gone[own / kRow] >> own % kRow & 1);
        __syncthreads();
        if (!stays) continue;
        if (threadIdx.x == 0) kept[own / 32] |= 1u << own % 32;
        for (int i = own / kRow + threadIdx.x; i < words; i += kSweepThreads)
            gone[i] |= mask[own * (long long)words + i];
        __syncthreads();
    }
}

}  // namespace enr
