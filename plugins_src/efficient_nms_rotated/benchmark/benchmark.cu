// Latency of rotated NMS against the plain pairwise algorithm, on scenes like those that RTMDet-R gives for a
// 1024-pixel image: 21504 boxes, 15 classes.  Both take turns; medians of 200 runs each.
#include <algorithm>
#include <cstring>
#include <memory>

#include "../tests/device.h"
#include "plain.cuh"

using namespace enr;

namespace {

constexpr int kBoxes = 21504, kClasses = 15, kScenes = 4, kRounds = 200;

struct Plain {
    DeviceRun& run;
    int count, words;
    Device<uint64_t> mask;
    Problem problem{};
    Workspace w{};
    size_t zeroed;

    Plain(DeviceRun& run, int count)
        : run(run), count(count), words((count + kRow - 1) / kRow), mask(size_t(run.batch) * count * words) {
        problem.batch = run.batch, problem.boxes = run.boxes, problem.classes = run.classes;
        problem.limit = problem.pairs = run.boxes * run.classes;
        problem.score_threshold = run.params.score_threshold, problem.iou_threshold = run.params.iou_threshold;
        problem.max_output = run.params.max_output_boxes, problem.background = -1;
        problem.together = true;  // candidates by rank; pair_masks looks at the classes
        lay_out(problem, run.workspace.data, w, zeroed);
        require(cudaFuncSetAttribute(sweep, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10), "sweep");
    }

    void operator()(cudaStream_t stream) {
        const float* boxes = (const float*)run.box_data.data;
        const float* scores = (const float*)run.score_data.data;
        const unsigned batch = run.batch;
        cudaMemsetAsync(w.counts, 0, zeroed, stream);
        filter<float><<<dim3(problem.pairs / 1024, batch), kFilterThreads, 0, stream>>>(scores, problem, w);
        sort_tiles<<<dim3(count / kSortTile + 1, batch), kSortThreads, 0, stream>>>(w.keys, w.counts, problem.pairs,
                                                                                    w.all);
        rank_scores<float><<<dim3(count / kRankThreads + 1, batch), kRankThreads, 0, stream>>>(boxes, problem, w);
        if (count) {
            pair_masks<float><<<dim3(words, words, batch), kRow, 0, stream>>>(
                boxes, problem, w, count, !run.params.class_agnostic, mask.data);
            sweep<<<batch, kSweepThreads, words * 8, stream>>>(w, count, words, mask.data);
        }
        write_output<float><<<dim3(std::max(count, problem.max_output) / kOutputThreads + 1, batch), kOutputThreads, 0,
                              stream>>>(boxes, problem, w, run.num.data, (float*)run.out_boxes.data,
                                        (float*)run.out_scores.data, run.out_classes.data);
        require(cudaPeekAtLastError(), "plain");
    }
};

struct Timer {
    cudaEvent_t start, stop;
    Timer() {
        require(cudaEventCreate(&start), "event");
        require(cudaEventCreate(&stop), "event");
    }
    template <typename Work>
    float microseconds(cudaStream_t stream, Work work) {
        float ms;
        require(cudaEventRecord(start, stream), "event");
        work();
        require(cudaEventRecord(stop, stream), "event");
        require(cudaEventSynchronize(stop), "event");
        require(cudaEventElapsedTime(&ms, start, stop), "event");
        return ms * 1000;
    }
};

float median(std::vector<float> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

// What any algorithm that tests pairs has to do on a scene: pairs of one class, those whose upright bounds meet.
void count_work(const Scene& scene, const enr_params& params, double& pairs, double& near) {
    pairs = near = 0;
    std::vector<std::vector<Bounds>> groups(scene.classes);
    for (int i = 0; i < scene.boxes; ++i)
        for (int k = 0; k < scene.classes; ++k)
            if (scene.score_data[size_t(i) * scene.classes + k] > params.score_threshold) {
                const float* box = &scene.box_data[size_t(i) * 5];
                groups[params.class_agnostic ? 0 : k].push_back(bounds_of({box[0], box[1], box[2], box[3], box[4]}));
            }
    for (const auto& group : groups) {
        pairs += double(group.size()) * (double(group.size()) - 1) / 2;
        for (size_t i = 0; i < group.size(); ++i)
            for (size_t j = 0; j < i; ++j) near += meet(group[i], group[j]);
    }
}

void measure(int candidates, int batch, bool together, cudaStream_t stream, Timer& timer) {
    const enr_params params{0.05f, 0.1f, 2000, -1, 0, together, 0};
    std::vector<std::unique_ptr<DeviceRun>> runs;
    std::vector<std::unique_ptr<Plain>> plains;
    std::vector<cudaGraphExec_t> graphs(kScenes);
    double pairs = 0, near = 0;
    bool same = true;
    for (int i = 0; i < kScenes; ++i) {
        const Scene scene = scene_of(batch, kBoxes, kClasses, 100 + i, {1024, 12, candidates, false});
        if (i == 0) count_work(scene, params, pairs, near);
        runs.push_back(std::make_unique<DeviceRun>(params, scene));
        plains.push_back(std::make_unique<Plain>(*runs.back(), candidates));
        require_enr(runs[i]->run(stream), "ours");
        require(cudaStreamSynchronize(stream), "ours");
        const Output ours = runs[i]->output();
        runs[i]->poison();
        (*plains[i])(stream);
        require(cudaStreamSynchronize(stream), "plain");
        same = same && ours == runs[i]->output();
        cudaGraph_t graph;
        require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
        require_enr(runs[i]->run(stream), "ours");
        require(cudaStreamEndCapture(stream, &graph), "capture");
        require(cudaGraphInstantiate(&graphs[i], graph, 0), "graph");
        require(cudaGraphDestroy(graph), "graph");
    }
    std::vector<float> ours, plain, replayed;
    for (int round = -10; round < kRounds; ++round) {
        const int i = (round + 10) % kScenes;
        const float a = timer.microseconds(stream, [&] { runs[i]->run(stream); });
        const float b = timer.microseconds(stream, [&] { (*plains[i])(stream); });
        const float c = timer.microseconds(stream, [&] { cudaGraphLaunch(graphs[i], stream); });
        if (round >= 0) ours.push_back(a), plain.push_back(b), replayed.push_back(c);
    }
    for (auto graph : graphs) require(cudaGraphExecDestroy(graph), "graph");
    const float a = median(ours), b = median(plain), c = median(replayed);
    std::printf("%10d %5d %8s %10.1f %10.1f %10.1f %8.1f %10.3g %10.3g %s\n", candidates, batch,
                together ? "together" : "apart", a, c, b, b / c, pairs, near, same ? "same" : "DIFFERENT");
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    cudaDeviceProp device;
    require(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    cudaStream_t stream;
    require(cudaStreamCreate(&stream), "cudaStreamCreate");
    Timer timer;
    const bool one = argc > 1 && !std::strcmp(argv[1], "--one");  // one setting, for a profiler
    std::printf("%s; us, medians of %d; %d boxes, %d classes\n", device.name, kRounds, kBoxes, kClasses);
    std::printf("%10s %5s %8s %10s %10s %10s %8s %10s %10s\n", "candidates", "batch", "classes", "ours", "graph", "plain",
                "ratio", "pairs", "near");
    if (one) {
        measure(std::atoi(argv[2]), std::atoi(argv[3]), false, stream, timer);
        return 0;
    }
    for (int batch : {1, 8})
        for (bool together : {false, true})
            for (int candidates : {0, 1000, 5000, kBoxes}) measure(candidates, batch, together, stream, timer);
    require(cudaStreamDestroy(stream), "cudaStreamDestroy");
    return 0;
}
