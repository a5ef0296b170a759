// Device memory that frees itself, and a run of the C API on it.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "brute_force.h"

namespace enr {

inline void require(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    std::exit(2);
}

inline void require_enr(int error, const char* what) {
    if (!error) return;
    std::fprintf(stderr, "%s: %s\n", what, enr_error(error));
    std::exit(2);
}

template <typename T>
struct Device {
    T* data = nullptr;
    size_t count;
    explicit Device(size_t count) : count(count) {
        require(cudaMalloc(&data, (count ? count : 1) * sizeof(T)), "cudaMalloc");
    }
    explicit Device(const std::vector<T>& host) : Device(host.size()) {
        require(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device() { cudaFree(data); }
    std::vector<T> host() const {
        std::vector<T> copy(count);
        require(cudaMemcpy(copy.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return copy;
    }
};

// A scene on the device, in float32 or float16, with its outputs and workspace.
struct DeviceRun {
    enr_params params;
    int batch, boxes, classes, dtype;
    Device<char> box_data, score_data;
    Device<int> num, out_classes;
    Device<char> out_boxes, out_scores;
    size_t workspace_bytes;
    Device<char> workspace;

    DeviceRun(const enr_params& params, const Scene& scene, int dtype = ENR_FLOAT32)
        : params(params), batch(scene.batch), boxes(scene.boxes), classes(scene.classes), dtype(dtype),
          box_data(coded(scene.box_data)), score_data(coded(scene.score_data)), num(scene.batch),
          out_classes(slots()), out_boxes(slots() * 5 * size()), out_scores(slots() * size()),
          workspace_bytes(enr_workspace_bytes(&params, batch, boxes, classes, dtype)), workspace(workspace_bytes) {
        // What is not written shows.
        poison();
    }

    size_t size() const { return dtype == ENR_FLOAT32 ? 4 : 2; }
    size_t slots() const { return size_t(batch) * params.max_output_boxes; }

    void poison() {
        require(cudaMemset(num.data, 0x5b, num.count * 4), "cudaMemset");
        require(cudaMemset(out_classes.data, 0x5b, out_classes.count * 4), "cudaMemset");
        require(cudaMemset(out_boxes.data, 0x5b, out_boxes.count), "cudaMemset");
        require(cudaMemset(out_scores.data, 0x5b, out_scores.count), "cudaMemset");
    }

    int run(cudaStream_t stream) {
        return enr_run(&params, batch, boxes, classes, dtype, box_data.data, score_data.data, num.data, out_boxes.data,
                       out_scores.data, out_classes.data, workspace.data, workspace_bytes, stream);
    }

    Output output() const {
        return {num.host(), out_classes.host(), decoded(out_boxes.host()), decoded(out_scores.host())};
    }

  private:
    std::vector<char> coded(const std::vector<float>& values) const {
        std::vector<char> bytes(values.size() * size());
        for (size_t i = 0; i < values.size(); ++i) {
            const Half half = from_float<Half>(values[i]);
            std::memcpy(&bytes[i * size()], dtype == ENR_FLOAT32 ? (const void*)&values[i] : &half, size());
        }
        return bytes;
    }

    std::vector<float> decoded(const std::vector<char>& bytes) const {
        std::vector<float> values(bytes.size() / size());
        for (size_t i = 0; i < values.size(); ++i) {
            Half half;
            std::memcpy(dtype == ENR_FLOAT32 ? (void*)&values[i] : &half, &bytes[i * size()], size());
            if (dtype != ENR_FLOAT32) values[i] = as_float(half);
        }
        return values;
    }
};

// The scene that the kernels see: rounded where they get half precision.
inline Scene as_seen(Scene scene, int dtype) {
    if (dtype == ENR_FLOAT16)
        for (auto* values : {&scene.box_data, &scene.score_data})
            for (float& value : *values) value = as_float(from_float<Half>(value));
    return scene;
}

}  // namespace enr
