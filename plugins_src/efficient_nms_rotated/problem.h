// The sizes of one call, and where everything lies in its workspace.
#pragma once

#include <cstddef>

#include "candidates.h"

namespace enr {

constexpr int kSortTile = 1024;  // keys that a block sorts
constexpr int kTile = 32;        // candidates that a block settles together: a lane each, a bit each

struct Problem {
    int batch, boxes, classes;
    int pairs;  // boxes * classes
    int limit;  // candidates of an image that go on to NMS at most
    float score_threshold, least_logit, iou_threshold;
    int max_output, background;
    bool logits, together;  // together: classes suppress each other

    // Whether candidates are grouped by class, so that each meets those of its own only.
    ENR_HD bool grouped() const { return !together && classes > 1; }
};

// A candidate in the order of NMS: by class where classes are apart, then by rank.
struct alignas(16) Candidate {
    int box, group, rank;  // rank: its place by falling score
    int unused;
};

// What is known of a tile's candidates, a bit each.  The bits of `kept` are a subset of those of `decided`.
struct Fates {
    unsigned kept, decided;
};

// Device memory, [batch, ...] each; `counts` to `kept` are zero to begin with.
struct Workspace {
    int* counts;              // [batch]: candidates
    int* ticket;              // the next tile to settle, over all images
    uint64_t* fates;          // [batch, tiles]: Fates
    unsigned* kept;           // [batch, tiles]: a bit a rank
    uint64_t* keys;           // [batch, all]: score keys, in any order, then sorted in tiles
    uint64_t* ranked;         // [batch, room]: score keys in order
    uint64_t* by_group;       // [batch, room]: (class, rank), sorted in tiles
    Bounds* bounds;           // [batch, room], in the order of NMS, like `candidates`
    Candidate* candidates;    // [batch, room]
    long long all, room;      // pairs and limit, rounded up to whole sorted tiles
    int tiles;                // room / kTile
};

inline long long whole_tiles(long long count) {
    return (count + kSortTile - 1) / kSortTile * kSortTile + (count == 0) * kSortTile;
}

// Lays the workspace out from `base`; returns its size.  With base null only the size is meant.
inline size_t lay_out(const Problem& problem, char* base, Workspace& w, size_t& zeroed) {
    const size_t batch = problem.batch;
    w.all = whole_tiles(problem.pairs), w.room = whole_tiles(problem.limit), w.tiles = int(w.room / kTile);
    size_t used = 0;
    auto take = [&](auto*& pointer, size_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
        used += (count * sizeof *pointer + 255) / 256 * 256;
    };
    take(w.counts, batch);
    take(w.ticket, 1);
    take(w.fates, batch * w.tiles);
    take(w.kept, batch * w.tiles);
    zeroed = used;
    take(w.keys, batch * w.all);
    take(w.ranked, batch * w.room);
    take(w.by_group, problem.grouped() ? batch * w.room : 0);
    take(w.bounds, batch * w.room);
    take(w.candidates, batch * w.room);
    return used;
}

}  // namespace enr
