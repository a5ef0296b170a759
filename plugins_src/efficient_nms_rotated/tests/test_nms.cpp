// The C API on the GPU against NMS by its definition on the CPU.  `--small`: what compute-sanitizer has time for.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "device.h"

using namespace enr;

namespace {

int failures = 0;

void report(const std::string& name, bool good) {
    std::printf("%-44s %s\n", name.c_str(), good ? "ok" : "FAILED");
    failures += !good;
}

void check(const std::string& name, const enr_params& params, const Scene& scene, int dtype = ENR_FLOAT32,
           int repeats = 1) {
    Output expected = by_definition(params, as_seen(scene, dtype));
    if (dtype == ENR_FLOAT16)
        for (float& score : expected.scores) score = as_float(from_float<Half>(score));
    DeviceRun device(params, scene, dtype);
    bool good = true;
    for (int i = 0; i < repeats && good; ++i) {
        device.poison();
        require_enr(device.run(nullptr), name.c_str());
        require(cudaDeviceSynchronize(), name.c_str());
        good = device.output() == expected;
    }
    report(name, good);
}

enr_params usual() { return {0.05f, 0.3f, 100, -1, 0, 0, 0}; }

// Boxes in a row of which each overlaps the next: every second one goes, and each waits for the one before.
Scene chain(int length) {
    Scene scene{1, length, 1, {}, {}};
    for (int i = 0; i < length; ++i) {
        const float box[5] = {i * 5.f, i * 2.f, 10, 4, 0.38f};
        scene.box_data.insert(scene.box_data.end(), box, box + 5);
        scene.score_data.push_back(1 - 0.5f * float(i) / float(length));
    }
    return scene;
}

Scene alike(int count) {
    Scene scene{1, count, 1, {}, std::vector<float>(count, 0.5f)};
    for (int i = 0; i < count; ++i) {
        const float box[5] = {512, 512, 64, 32, 0.7f};
        scene.box_data.insert(scene.box_data.end(), box, box + 5);
    }
    return scene;
}

void small() {
    enr_params params = usual();
    check("no boxes", params, scene_of(2, 0, 3, 1));
    check("one box", params, scene_of(1, 1, 1, 2));
    check("nothing passes", {1.5f, 0.3f, 10, -1, 0, 0, 0}, scene_of(2, 100, 3, 3));
    check("two images, five classes", params, scene_of(2, 400, 5, 4));
    check("float16", params, scene_of(2, 400, 5, 5), ENR_FLOAT16);
    check("ties", {0.05f, 0.3f, 300, -1, 0, 0, 0}, scene_of(2, 300, 3, 6, {200, 12, -1, true}));
    check("classes together", {0.05f, 0.3f, 100, -1, 0, 1, 0}, scene_of(2, 400, 3, 7));
    check("background", {0.05f, 0.3f, 100, 1, 0, 0, 0}, scene_of(1, 300, 3, 8));
    check("pre_nms_topk", {0.05f, 0.3f, 100, -1, 0, 0, 77}, scene_of(2, 300, 3, 9));
    check("one output", {0.05f, 0.3f, 1, -1, 0, 0, 0}, scene_of(2, 300, 3, 10));
    check("chain", {0.05f, 0.2f, 2000, -1, 0, 0, 0}, chain(300));
    check("alike", params, alike(300));
    Scene logits = scene_of(2, 300, 3, 11);
    for (float& score : logits.score_data) score = 8 * score - 4;
    check("logits", {0.3f, 0.3f, 100, -1, 1, 0, 0}, logits);
    Scene odd = scene_of(1, 300, 2, 12);
    const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
    odd.score_data[3] = odd.score_data[200] = nan;
    odd.box_data[5] = nan, odd.box_data[50] = inf, odd.box_data[104] = -inf, odd.box_data[302] = 0;
    odd.score_data[2] = odd.score_data[20] = odd.score_data[41] = odd.score_data[120] = 0.99f;
    check("numbers that are none", params, odd);
}

void large() {
    const enr_params many{0.05f, 0.1f, 2000, -1, 0, 0, 0}, together{0.05f, 0.1f, 2000, -1, 0, 1, 0};
    check("21504 boxes, 5000 candidates, twice 8", many, scene_of(8, 21504, 15, 20, {1024, 12, 5000, false}), 0, 20);
    check("all of 21504 candidates", many, scene_of(2, 21504, 15, 21, {1024, 12, 21504, false}), 0, 20);
    check("all of 21504 candidates, together", together, scene_of(1, 21504, 15, 22, {1024, 12, 21504, false}), 0, 20);
    check("5001 candidates, float16", many, scene_of(2, 6000, 15, 23, {1024, 12, 5001, false}), ENR_FLOAT16, 20);
    check("120000 pairs", {0.2f, 0.3f, 300, -1, 0, 0, 0}, scene_of(1, 8000, 15, 24), 0, 5);
    check("120000 pairs, the best 3000", {0.2f, 0.3f, 300, -1, 0, 0, 3000}, scene_of(1, 8000, 15, 25), 0, 5);
    check("crowded, together", {0.05f, 0.5f, 3000, -1, 0, 1, 0}, scene_of(1, 6000, 1, 26, {100, 12, -1, false}), 0, 20);
    check("ties", {0.05f, 0.5f, 3000, -1, 0, 0, 0}, scene_of(4, 5000, 2, 27, {300, 12, -1, true}), 0, 20);
    check("chain of 6000", {0.05f, 0.2f, 6000, -1, 0, 0, 0}, chain(6000), 0, 20);
    check("20000 alike", usual(), alike(20000), 0, 5);
    check("batch 64", usual(), scene_of(64, 500, 3, 28), 0, 5);
}

// A graph of the work replays to the same answer.
void graph() {
    const Scene scene = scene_of(2, 2000, 5, 30);
    const enr_params params = usual();
    DeviceRun device(params, scene);
    cudaStream_t stream;
    cudaGraph_t captured;
    cudaGraphExec_t replayed;
    require(cudaStreamCreate(&stream), "cudaStreamCreate");
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    require_enr(device.run(stream), "graph");
    require(cudaStreamEndCapture(stream, &captured), "cudaStreamEndCapture");
    require(cudaGraphInstantiate(&replayed, captured, 0), "cudaGraphInstantiate");
    bool good = true;
    for (int i = 0; i < 3; ++i) {
        device.poison();
        require(cudaGraphLaunch(replayed, stream), "cudaGraphLaunch");
        require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        good = good && device.output() == by_definition(params, scene);
    }
    report("CUDA graph", good);
    require(cudaGraphExecDestroy(replayed), "cudaGraphExecDestroy");
    require(cudaGraphDestroy(captured), "cudaGraphDestroy");
    require(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

void refusals() {
    enr_params params = usual();
    DeviceRun device(params, scene_of(1, 10, 2, 40));
    bool good = enr_workspace_bytes(&params, 1, 10, 0, 0) == 0 && enr_workspace_bytes(&params, 1, 10, 2, 7) == 0 &&
                enr_workspace_bytes(&params, 1, 1 << 30, 2, 0) == 0;
    device.workspace_bytes -= 1;
    good = good && device.run(nullptr) != 0;
    device.workspace_bytes += 1, device.params.iou_threshold = 1.5f;
    good = good && device.run(nullptr) != 0 && std::strlen(enr_error(device.run(nullptr))) > 10;
    report("refusals", good);
}

}  // namespace

int main(int argc, char** argv) {
    small();
    refusals();
    if (argc < 2 || std::strcmp(argv[1], "--small")) {
        graph();
        large();
    }
    std::printf("%s\n", failures ? "FAILED" : "all ok");
    return failures != 0;
}
