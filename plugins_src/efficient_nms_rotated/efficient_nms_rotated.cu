#include "efficient_nms_rotated.h"

#include <type_traits>

#include "output.cuh"
#include "settle.cuh"

namespace enr {
namespace {

enum Error {
    kNull = -1,
    kSize = -2,
    kTooLarge = -3,
    kDtype = -4,
    kScoreThreshold = -5,
    kIouThreshold = -6,
    kMaxOutput = -7,
    kBackground = -8,
    kTopk = -9,
    kSwitch = -10,
    kWorkspace = -11,
    kAlignment = -12,
};

constexpr int kMostPairs = 1 << 30;
constexpr int kMostBatch = 65535;       // of a grid's second dimension
constexpr long long kMostTickets = 1 << 30;
constexpr int kMostBlocks = 1024;

Problem problem_of(const enr_params& params, int batch, int boxes, int classes) {
    Problem problem{};
    problem.batch = batch, problem.boxes = boxes, problem.classes = classes;
    problem.pairs = boxes * classes;
    problem.limit = params.pre_nms_topk && params.pre_nms_topk < problem.pairs ? params.pre_nms_topk : problem.pairs;
    problem.score_threshold = params.score_threshold, problem.iou_threshold = params.iou_threshold;
    problem.least_logit = least_logit(params.score_threshold);
    problem.max_output = params.max_output_boxes, problem.background = params.background_class;
    problem.logits = params.score_activation, problem.together = params.class_agnostic;
    return problem;
}

// Blocks for `items` of an image at `each` a block; no more than fill any GPU, as blocks go on to what is left.
dim3 grid(long long items, int each, int batch, int most = kMostBlocks) {
    const long long blocks = (items + each - 1) / each;
    return dim3(unsigned(blocks < 1 ? 1 : blocks > most ? most : blocks), unsigned(batch));
}

template <typename T>
int run(const Problem& problem, const Workspace& w, size_t zeroed, const T* boxes, const T* scores, int* num_detections,
        T* detection_boxes, T* detection_scores, int* detection_classes, cudaStream_t stream) {
    const int batch = problem.batch;
    cudaError_t error = cudaMemsetAsync(w.counts, 0, zeroed, stream);
    auto then = [&](auto kernel, dim3 blocks, int threads, auto... arguments) {
        if (error == cudaSuccess) error = launch(kernel, blocks, threads, stream, arguments...);
    };
    then(filter<T>, grid(problem.pairs, kFilterThreads * kFilterItems, batch), kFilterThreads, scores, problem, w);
    then(sort_tiles, grid(problem.pairs, kSortTile, batch), kSortThreads, w.keys, (const int*)w.counts, problem.pairs,
         w.all);
    then(rank_scores<T>, grid(problem.pairs, kRankThreads, batch), kRankThreads, boxes, problem, w);
    if (problem.grouped()) {
        then(sort_tiles, grid(problem.limit, kSortTile, batch), kSortThreads, w.by_group, (const int*)w.counts,
             problem.limit, w.room);
        then(rank_groups<T>, grid(problem.limit, kRankThreads, batch), kRankThreads, boxes, problem, w);
    }
    const long long tiles = (long long)w.tiles * batch;
    then(settle_tiles<T>, grid(tiles, 1, 1), kSettleThreads, boxes, problem, w);
    const int items = problem.limit > problem.max_output ? problem.limit : problem.max_output;
    then(write_output<T>, grid(items, kOutputThreads, batch), kOutputThreads, boxes, problem, w, num_detections,
         detection_boxes, detection_scores, detection_classes);
    return error;
}

}  // namespace
}  // namespace enr

extern "C" {

int enr_check(const enr_params* params, int batch, int boxes, int classes, int dtype) {
    using namespace enr;
    if (!params) return kNull;
    if (batch < 1 || boxes < 0 || classes < 1) return kSize;
    if ((long long)boxes * classes > kMostPairs || batch > kMostBatch) return kTooLarge;
    if (whole_tiles((long long)boxes * classes) / kTile * batch > kMostTickets) return kTooLarge;
    if (dtype != ENR_FLOAT32 && dtype != ENR_FLOAT16) return kDtype;
    if (std::isnan(params->score_threshold)) return kScoreThreshold;
    if (!(params->iou_threshold >= 0 && params->iou_threshold <= 1)) return kIouThreshold;
    if (params->max_output_boxes < 1) return kMaxOutput;
    if (params->background_class < -1) return kBackground;
    if (params->pre_nms_topk < 0) return kTopk;
    const int activation = params->score_activation, agnostic = params->class_agnostic;
    if (activation < 0 || activation > 1 || agnostic < 0 || agnostic > 1) return kSwitch;
    return 0;
}

size_t enr_workspace_bytes(const enr_params* params, int batch, int boxes, int classes, int dtype) {
    if (enr_check(params, batch, boxes, classes, dtype)) return 0;
    enr::Workspace w{};
    size_t zeroed;
    return lay_out(enr::problem_of(*params, batch, boxes, classes), nullptr, w, zeroed);
}

int enr_run(const enr_params* params, int batch, int boxes, int classes, int dtype, const void* boxes_data,
            const void* scores_data, int* num_detections, void* detection_boxes, void* detection_scores,
            int* detection_classes, void* workspace, size_t workspace_bytes, void* stream) {
    using namespace enr;
    if (int error = enr_check(params, batch, boxes, classes, dtype)) return error;
    if ((boxes && (!boxes_data || !scores_data)) || !num_detections || !detection_boxes || !detection_scores ||
        !detection_classes || !workspace)
        return kNull;
    if (reinterpret_cast<uintptr_t>(workspace) % 16) return kAlignment;
    const Problem problem = problem_of(*params, batch, boxes, classes);
    Workspace w{};
    size_t zeroed;
    if (lay_out(problem, static_cast<char*>(workspace), w, zeroed) > workspace_bytes) return kWorkspace;
    auto typed = [&](auto one) {
        using T = decltype(one);
        return run<T>(problem, w, zeroed, static_cast<const T*>(boxes_data), static_cast<const T*>(scores_data),
                      num_detections, static_cast<T*>(detection_boxes), static_cast<T*>(detection_scores),
                      detection_classes, static_cast<cudaStream_t>(stream));
    };
    return dtype == ENR_FLOAT32 ? typed(0.f) : typed(Half{});
}

const char* enr_error(int error) {
    using namespace enr;
    switch (error) {
        case 0: return "no error";
        case kNull: return "a pointer is null";
        case kSize: return "batch and classes must be 1 or more, boxes 0 or more";
        case kTooLarge: return "too large: boxes * classes may be 2^30 at most, batch 65535, their product 2^35";
        case kDtype: return "dtype must be ENR_FLOAT32 or ENR_FLOAT16";
        case kScoreThreshold: return "score_threshold is not a number";
        case kIouThreshold: return "iou_threshold must be from 0 to 1";
        case kMaxOutput: return "max_output_boxes must be 1 or more";
        case kBackground: return "background_class must be -1, for none, or a class";
        case kTopk: return "pre_nms_topk must be 0, for all, or more";
        case kSwitch: return "score_activation and class_agnostic must be 0 or 1";
        case kWorkspace: return "the workspace is smaller than enr_workspace_bytes says";
        case kAlignment: return "the workspace is not aligned";
        default: return error > 0 ? cudaGetErrorString(cudaError_t(error)) : "unknown error";
    }
}

}  // extern "C"
