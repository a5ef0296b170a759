// Rotated NMS by its definition, on the CPU, and scenes to try it on.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "../candidates.h"
#include "../efficient_nms_rotated.h"

namespace enr {

struct Scene {
    int batch, boxes, classes;
    std::vector<float> box_data, score_data;
};

struct Output {
    std::vector<int> num, classes;
    std::vector<float> boxes, scores;
    // By bits, as a box may hold a NaN.
    bool operator==(const Output& other) const {
        return num == other.num && classes == other.classes && same(boxes, other.boxes) && same(scores, other.scores);
    }

    static bool same(const std::vector<float>& a, const std::vector<float>& b) {
        return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
    }
};

struct SceneOptions {
    double side = 1024;      // of the image
    int per_object = 12;     // boxes about one object
    int candidates = -1;     // boxes that score above 0.05, in one class each; -1: all boxes, in any class
    bool tied = false;       // few distinct scores
};

// Boxes about objects, as a detector gives them.
inline Scene scene_of(int batch, int boxes, int classes, unsigned seed, const SceneOptions& options = {}) {
    Scene scene{batch, boxes, classes, {}, {}};
    scene.box_data.resize(size_t(batch) * boxes * 5);
    scene.score_data.resize(size_t(batch) * boxes * classes);
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> unit(0, 1);
    std::normal_distribution<float> normal;
    for (int image = 0; image < batch; ++image) {
        // The candidates are spread over the boxes, as they are over a feature map.
        const int candidates = options.candidates < 0 ? boxes : options.candidates;
        std::vector<int> places(boxes);
        for (int i = 0; i < boxes; ++i) places[i] = i;
        std::shuffle(places.begin(), places.end(), random);
        float object[5] = {};
        int kind = 0;
        for (int i = 0; i < boxes; ++i) {
            if (i % options.per_object == 0) {
                object[0] = unit(random) * float(options.side), object[1] = unit(random) * float(options.side);
                object[2] = std::exp(3 + 0.6f * normal(random)), object[3] = std::exp(2.5f + 0.6f * normal(random));
                object[4] = (unit(random) - 0.5f) * 3.14159265f;
                kind = int(unit(random) * classes) % classes;
            }
            float* box = &scene.box_data[(size_t(image) * boxes + places[i]) * 5];
            float* scores = &scene.score_data[(size_t(image) * boxes + places[i]) * classes];
            for (int k = 0; k < 2; ++k) {
                box[k] = object[k] + 0.15f * object[2 + k] * normal(random);
                box[2 + k] = object[2 + k] * std::exp(0.15f * normal(random));
            }
            box[4] = object[4] + 0.1f * normal(random);
            for (int k = 0; k < classes; ++k) {
                float score = unit(random);
                if (options.candidates >= 0)
                    score = i < candidates && k == kind ? 0.051f + 0.9f * score * score * score : 0.04f * score;
                scores[k] = options.tied ? std::round(score * 16) / 16 : score;
            }
        }
    }
    return scene;
}

inline Output by_definition(const enr_params& params, const Scene& scene) {
    const int most = params.max_output_boxes;
    Output output;
    output.num.assign(scene.batch, 0);
    output.boxes.assign(size_t(scene.batch) * most * 5, 0);
    output.scores.assign(size_t(scene.batch) * most, 0);
    output.classes.assign(size_t(scene.batch) * most, -1);
    for (int image = 0; image < scene.batch; ++image) {
        const float* boxes = &scene.box_data[size_t(image) * scene.boxes * 5];
        const float* scores = &scene.score_data[size_t(image) * scene.boxes * scene.classes];
        struct Pair {
            float score;
            int flat;
        };
        std::vector<Pair> pairs;
        for (int flat = 0; flat < scene.boxes * scene.classes; ++flat) {
            const float score = params.score_activation ? sigmoid(scores[flat]) : scores[flat];
            if (score > params.score_threshold && flat % scene.classes != params.background_class)
                pairs.push_back({score, flat});
        }
        std::stable_sort(pairs.begin(), pairs.end(), [](auto& a, auto& b) { return a.score > b.score; });
        if (params.pre_nms_topk && pairs.size() > size_t(params.pre_nms_topk)) pairs.resize(params.pre_nms_topk);
        std::vector<Pair> kept;
        auto box_of = [&](const Pair& pair) {
            const float* box = boxes + pair.flat / scene.classes * 5;
            return Box{box[0], box[1], box[2], box[3], box[4]};
        };
        for (const Pair& pair : pairs) {
            const bool suppressed = std::any_of(kept.begin(), kept.end(), [&](const Pair& earlier) {
                return (params.class_agnostic || earlier.flat % scene.classes == pair.flat % scene.classes) &&
                       float(exact_iou(box_of(earlier), box_of(pair))) > params.iou_threshold;
            });
            if (suppressed) continue;
            const size_t slot = size_t(image) * most + output.num[image]++;
            std::copy_n(boxes + pair.flat / scene.classes * 5, 5, &output.boxes[slot * 5]);
            output.scores[slot] = pair.score, output.classes[slot] = pair.flat % scene.classes;
            kept.push_back(pair);
            if (int(kept.size()) == most) break;
        }
    }
    return output;
}

}  // namespace enr
