// Greedy suppression, of all tiles at once.
//
// A candidate depends on those before it that overlap it enough, and on nothing else: it is suppressed when one of them
// is kept, and kept when all of them are suppressed.  A block takes a tile of 32 candidates, looks for the ones before
// that they depend on, and settles its own as soon as those are settled.  So the time goes with the longest chain of
// boxes that overlap, not with the number of boxes, and the result is the one of the sequential algorithm, whatever
// the blocks' timing.
//
// Blocks draw tiles from a counter, earlier tiles first, and a tile waits for earlier ones of its image only: whatever
// is waited for is being worked on, or done, however few blocks run at a time.
#pragma once

#include "order.cuh"

namespace enr {

constexpr int kSettleThreads = 256, kSettleWarps = kSettleThreads / 32;
constexpr int kPending = 1024;

struct Dependency {
    int own, other;  // the bit of a candidate in its tile; the place of one before it
};

// What a warp found near: pairs whose IoU is to be computed, 32 at a time.
struct Finds {
    Bounds bounds[32];
    int places[32];
    Dependency queue[64];
};

struct SettleShared {
    Box boxes[kTile];
    unsigned conflicts[kTile];      // those of the tile on which each depends
    unsigned gone;                  // candidates suppressed by ones before the tile
    int kept;                       // how many kept ones of the group were seen before the tile
    int pending;
    Dependency pendings[kPending];  // dependencies on what was not settled
    int ticket, most;
    Finds finds[kSettleWarps];
};

__device__ __forceinline__ Fates load_fates(const uint64_t* fates, int tile) {
    const uint64_t both = *reinterpret_cast<const volatile uint64_t*>(fates + tile);
    return {unsigned(both), unsigned(both >> 32)};
}

__device__ __forceinline__ void store_fates(uint64_t* fates, int tile, unsigned kept, unsigned decided) {
    *reinterpret_cast<volatile uint64_t*>(fates + tile) = uint64_t(decided) << 32 | kept;
}

// The first place at which the group `group` is, in candidates sorted by group; of a whole warp.
__device__ __forceinline__ int start_of(int group, const Candidate* candidates, int end, int lane) {
    int low = 0, high = end;  // it is in [low, high]
    while (low < high) {
        const int step = (high - low + 31) / 32, at = low + lane * step;
        const unsigned before = __ballot_sync(kWarp, at < high && candidates[at].group < group);
        const int passed = __popc(before);  // probes that are still before it
        const int last = low + (passed - 1) * step;
        high = min(high, low + passed * step);
        if (passed) low = last + 1;
    }
    return low;
}

// One tile of one image, by a block.
template <typename T>
struct Settling {
    const T* boxes;                // of the image, like the others
    const Candidate* candidates;
    const Bounds* bounds;
    uint64_t* fates;
    unsigned* kept_ranks;
    float threshold;
    int max_output;
    SettleShared& block;
    int tile, count, lane, warp;

    __device__ Box box_at(int place) const { return load_box(boxes, candidates[place].box); }

    // Dependencies within the tile: a pair a thread, four times.
    __device__ void look_inside(const Bounds& own, int group) {
        for (int other = warp; other < kTile; other += kSettleWarps) {
            const Bounds there{__shfl_sync(kWarp, own.x1, other), __shfl_sync(kWarp, own.y1, other),
                               __shfl_sync(kWarp, own.x2, other), __shfl_sync(kWarp, own.y2, other)};
            const bool same = __shfl_sync(kWarp, group, other) == group;
            if (other < lane && same && meet(there, own) &&
                suppresses(block.boxes[other], block.boxes[lane], threshold))
                atomicOr(&block.conflicts[lane], 1u << other);
        }
    }

    // Dependencies on candidates from `begin` on and before the tile: warps take turns at tiles, the best first.
    __device__ void look_before(const Bounds& own, int begin) {
        Finds& finds = block.finds[warp];
        int queued = 0;
        for (int other = begin / kTile + warp; other < tile; other += kSettleWarps) {
            const Fates known = load_fates(fates, other);
            unsigned alive = ~known.decided | known.kept;
            if (other == begin / kTile) alive &= ~0u << begin % kTile;
            alive = __shfl_sync(kWarp, alive, 0);
            int before = 0;
            unsigned gone = 0;
            if (lane == 0) {
                const int kept = __popc(alive & known.kept);
                before = atomicAdd(&block.kept, kept) + kept;
                gone = atomicOr(&block.gone, 0u);
            }
            before = __shfl_sync(kWarp, before, 0);
            gone = __shfl_sync(kWarp, gone, 0);
            // As many as are wanted are kept before this tile, or nothing is left of it.
            if (before >= max_output || gone == ~0u) return;

            if (alive >> lane & 1) {
                const int slot = __popc(alive & lanes_below(lane)), place = other * kTile + lane;
                finds.bounds[slot] = bounds[place];
                finds.places[slot] = place;
            }
            __syncwarp();
            const int near = __popc(alive);
            unsigned found = 0;
#pragma unroll 8
            for (int i = 0; i < near; ++i) found |= unsigned(meet(finds.bounds[i], own)) << i;
            if (gone >> lane & 1) found = 0;
            queued = queue_found(found, queued);
            __syncwarp();
        }
        compute_queued(queued);
    }

    // Adds what each lane found to the warp's queue, and computes whenever 32 pairs have come together.
    __device__ int queue_found(unsigned found, int queued) {
        Finds& finds = block.finds[warp];
        for (;;) {
            const unsigned more = __ballot_sync(kWarp, found != 0);
            if (!more) return queued;
            if (found) {
                finds.queue[queued + __popc(more & lanes_below(lane))] = {lane, finds.places[__ffs(found) - 1]};
                found &= found - 1;
            }
            queued += __popc(more);
            __syncwarp();
            if (queued >= 32) {
                compute_queued(32);
                queued -= 32;
                if (lane < queued) finds.queue[lane] = finds.queue[32 + lane];
                __syncwarp();
            }
        }
    }

    // IoUs of the first `queued` pairs of the warp's queue, a lane each.
    __device__ void compute_queued(int queued) {
        if (lane < queued) {
            const Dependency pair = block.finds[warp].queue[lane];
            const unsigned bit = 1u << pair.own;
            if (!(atomicOr(&block.gone, 0u) & bit)) {
                bool decided, kept;
                look_up(pair.other, decided, kept);
                if ((kept || !decided) && suppresses(box_at(pair.other), block.boxes[pair.own], threshold)) {
                    if (!decided) kept = !remembered(pair) && waited_for(pair.other);
                    if (decided || kept) atomicOr(&block.gone, bit);
                }
            }
        }
        __syncwarp();
    }

    __device__ void look_up(int place, bool& decided, bool& kept) const {
        const Fates known = load_fates(fates, place / kTile);
        decided = known.decided >> place % kTile & 1;
        kept = known.kept >> place % kTile & 1;
    }

    __device__ bool remembered(const Dependency& pair) {
        const int slot = atomicAdd(&block.pending, 1);
        if (slot >= kPending) return false;
        block.pendings[slot] = pair;
        return true;
    }

    __device__ bool waited_for(int place) const {
        bool decided, kept;
        for (look_up(place, decided, kept); !decided; look_up(place, decided, kept)) pause();
        return kept;
    }

    // Settles the tile, by one warp: a candidate a lane.  `beyond`: those that no output has room for.
    __device__ void settle(int rank, unsigned beyond) {
        const unsigned valid = __ballot_sync(kWarp, tile * kTile + lane < count);
        const unsigned conflicts = block.conflicts[lane], own = 1u << lane;
        const int pending = min(block.pending, kPending);
        // Places behind the last candidate count as gone.
        unsigned kept = 0, gone = block.gone | beyond | ~valid, published = 0;
        for (;;) {
            unsigned hit = 0, waiting = 0;
            for (int i = lane; i < pending; i += 32) {
                const Dependency pair = block.pendings[i];
                if (pair.other < 0 || gone >> pair.own & 1) continue;
                bool other_decided, other_kept;
                look_up(pair.other, other_decided, other_kept);
                if (other_kept) hit |= 1u << pair.own;
                if (!other_decided) waiting |= 1u << pair.own;
                if (other_decided) block.pendings[i].other = -1;
            }
            gone |= or_of_warp(hit);
            waiting = or_of_warp(waiting);
            unsigned changed;
            do {
                const unsigned open = ~(kept | gone);
                const bool undecided = open & own, suppressed = conflicts & kept;
                const bool free = !(waiting & own) && !(conflicts & open);
                const unsigned more_gone = __ballot_sync(kWarp, undecided && suppressed);
                const unsigned more_kept = __ballot_sync(kWarp, undecided && !suppressed && free);
                gone |= more_gone, kept |= more_kept;
                changed = more_gone | more_kept;
            } while (changed);
            const unsigned fresh = (kept | gone) & ~published;
            if (fresh && lane == 0) store_fates(fates, tile, kept, kept | gone);
            if (fresh & kept & own) atomicOr(&kept_ranks[rank / 32], 1u << rank % 32);
            published |= fresh;
            if (published == ~0u) return;
            pause();
        }
    }

    __device__ void run() {
        const int place = tile * kTile + lane;
        Bounds own{INFINITY, INFINITY, -INFINITY, -INFINITY};
        Candidate candidate{0, -1, 0, 0};
        if (place < count) own = bounds[place], candidate = candidates[place];
        if (warp == 0) {
            if (place < count) block.boxes[lane] = box_at(place);
            block.conflicts[lane] = 0;
            if (lane == 0) block.gone = 0, block.kept = 0, block.pending = 0;
        }
        __syncthreads();
        look_inside(own, candidate.group);
        // Only the group that the tile begins with is before it, too.
        const int group = __shfl_sync(kWarp, candidate.group, 0);
        if (candidate.group != group) own = {INFINITY, INFINITY, -INFINITY, -INFINITY};
        const int begin = start_of(group, candidates, tile * kTile, lane);
        look_before(own, begin);
        __syncthreads();
        if (warp == 0) {
            const unsigned of_group = __ballot_sync(kWarp, candidate.group == group);
            settle(candidate.rank, block.kept >= max_output ? of_group : 0u);
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(kSettleThreads) settle_tiles(const T* boxes, Problem problem, Workspace w) {
    SettleShared& block = shared<SettleShared>();
    if (threadIdx.x == 0) {
        int most = 0;
        for (int image = 0; image < problem.batch; ++image)
            most = max(most, min(w.counts[image], problem.limit));
        block.most = (most + kTile - 1) / kTile;
    }
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) block.ticket = atomicAdd(w.ticket, 1);
        __syncthreads();
        // Images take turns: each is a chain of its own.
        const int image = block.ticket % problem.batch, tile = block.ticket / problem.batch;
        if (tile >= block.most) return;
        const int count = min(w.counts[image], problem.limit);
        if (tile * kTile >= count) continue;
        const long long first = image * w.room, first_tile = image * (long long)w.tiles;
        Settling<T> settling{boxes + image * (long long)problem.boxes * 5,
                             w.candidates + first,
                             w.bounds + first,
                             w.fates + first_tile,
                             w.kept + first_tile,
                             problem.iou_threshold,
                             problem.max_output,
                             block,
                             tile,
                             count,
                             int(threadIdx.x % 32),
                             int(threadIdx.x / 32)};
        settling.run();
    }
}

}  // namespace enr
