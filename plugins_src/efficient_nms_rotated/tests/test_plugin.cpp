// The plugin without TensorRT: what its creator takes and refuses, what it writes into an engine and reads back, the
// types and shapes it accepts, and a run, on the kernels that are linked: cuda_on_cpu.h's, as memory is the CPU's.
#include "../plugin/trt_api.h"

// Instead of entering the creator in the registry, which is TensorRT's.
#undef REGISTER_TENSORRT_PLUGIN
#define REGISTER_TENSORRT_PLUGIN(Type) \
    Type& registered() { \
        static Type one; \
        return one; \
    }
#include "../plugin/plugin.cpp"

#include <cstdio>
#include <memory>
#include <vector>

#include "brute_force.h"

namespace {

struct Recorder final : ILogger {
    std::string said;
    void log(Severity severity, const char* message) noexcept override {
        if (severity == Severity::kERROR) said = message;
    }
} recorder;

}  // namespace

// TensorRT's own logger, for this program.
extern "C" ILogger* getLogger() noexcept { return &recorder; }

namespace enr {
namespace {

int failures = 0;

void report(const std::string& name, bool good) {
    std::printf("%-60s %s\n", name.c_str(), good ? "ok" : "FAILED");
    failures += !good;
}

struct Destroy {
    void operator()(IPluginV2* plugin) const { plugin->destroy(); }
};
using Plugin = std::unique_ptr<IPluginV2, Destroy>;

// Attributes of a node, as a parser passes them.
struct Fields {
    std::vector<PluginField> fields;
    std::vector<std::unique_ptr<char[]>> values;

    template <typename T>
    Fields& with(const char* name, T value, PluginFieldType type, int length = 1) {
        without(name);
        values.emplace_back(new char[sizeof(T)]);
        std::memcpy(values.back().get(), &value, sizeof(T));
        fields.push_back(PluginField{name, values.back().get(), type, length});
        return *this;
    }
    Fields& with(const char* name, float value) { return with(name, value, PluginFieldType::kFLOAT32); }
    Fields& with(const char* name, int value) { return with(name, value, PluginFieldType::kINT32); }
    Fields& without(const char* name) {
        for (size_t i = 0; i < fields.size(); ++i)
            if (!std::strcmp(fields[i].name, name)) fields.erase(fields.begin() + i--);
        return *this;
    }
    Plugin plugin() {
        const PluginFieldCollection collection{int32_t(fields.size()), fields.data()};
        recorder.said.clear();
        return Plugin(registered().createPlugin("nms", &collection));
    }
};

Fields usual() {
    Fields fields;
    fields.with("score_threshold", 0.05f).with("iou_threshold", 0.3f).with("max_output_boxes", 100);
    return fields;
}

std::string bytes_of(const IPluginV2& plugin) {
    // A byte more than it says, to see that it writes no more.
    std::string bytes(plugin.getSerializationSize() + 1, '\x5a');
    plugin.serialize(&bytes[0]);
    if (bytes.back() != '\x5a') return "";
    bytes.pop_back();
    return bytes;
}

Plugin from_bytes(const std::string& bytes) {
    recorder.said.clear();
    return Plugin(registered().deserializePlugin("nms", bytes.data(), bytes.size()));
}

bool said(const std::string& what) { return recorder.said.find(what) != std::string::npos; }

void creator() {
    const PluginFieldCollection* names = registered().getFieldNames();
    bool good = !std::strcmp(registered().getPluginName(), "EfficientNMSRotated_TRT") &&
                !std::strcmp(registered().getPluginVersion(), "1") && names && names->nbFields == 7;
    for (int i = 0; good && i < names->nbFields; ++i) {
        const bool real = std::strstr(names->fields[i].name, "_threshold");
        good = names->fields[i].type == (real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32);
    }
    report("the creator's name, version and attributes", good);
}

void attributes() {
    report("attributes that may be missing", bool(usual().plugin()) && recorder.said.empty());
    report("attributes of other plugins are passed over", bool(usual().with("box_coding", 1).plugin()));
    Fields empty = usual();
    empty.fields.push_back(PluginField{"background_class", nullptr, PluginFieldType::kINT32, 0});
    report("an attribute without a value is a missing one", bool(empty.plugin()));
    for (const char* name : {"score_threshold", "iou_threshold", "max_output_boxes"})
        report(std::string("without ") + name,
               !usual().without(name).plugin() && said(std::string(name) + " is missing"));
    auto refused = [](const std::string& name, Fields& fields, const std::string& reason) {
        report(name, !fields.plugin() && said(reason));
    };
    refused("iou_threshold 1.5", usual().with("iou_threshold", 1.5f), "iou_threshold must be from 0 to 1");
    refused("iou_threshold NaN", usual().with("iou_threshold", NAN), "iou_threshold must be from 0 to 1");
    refused("score_threshold NaN", usual().with("score_threshold", NAN), "score_threshold is not a number");
    refused("max_output_boxes 0", usual().with("max_output_boxes", 0), "max_output_boxes must be 1 or more");
    refused("background_class -2", usual().with("background_class", -2), "background_class must be -1");
    refused("score_activation 2", usual().with("score_activation", 2), "must be 0 or 1");
    refused("class_agnostic -1", usual().with("class_agnostic", -1), "must be 0 or 1");
    refused("pre_nms_topk -1", usual().with("pre_nms_topk", -1), "pre_nms_topk must be 0");
    refused("an int32 for a float32", usual().with("iou_threshold", 1), "iou_threshold must be one float32");
    refused("a float32 for an int32", usual().with("pre_nms_topk", 1.f), "pre_nms_topk must be one int32");
    refused("two numbers for one",
            usual().with("max_output_boxes", int64_t(1), PluginFieldType::kINT32, 2),
            "max_output_boxes must be one int32");
    recorder.said.clear();
    report("no attributes at all", !Plugin(registered().createPlugin("nms", nullptr)) && said("no attributes"));
}

void serialization() {
    Fields fields = usual();
    fields.with("background_class", 3).with("score_activation", 1).with("class_agnostic", 1).with("pre_nms_topk", 77);
    const Plugin plugin = fields.plugin();
    plugin->setPluginNamespace("ours");
    const std::string bytes = bytes_of(*plugin);
    const Plugin copy = from_bytes(bytes), clone(plugin->clone());
    report("serialized, read and serialized again", bytes.size() > 28 && copy && bytes_of(*copy) == bytes);
    report("a clone is the same", bytes_of(*clone) == bytes && !std::strcmp(clone->getPluginNamespace(), "ours"));
    report("other parameters are other bytes", bytes_of(*fields.with("pre_nms_topk", 78).plugin()) != bytes);

    bool good = true;
    for (size_t length = 0; length < bytes.size(); ++length) good = good && !from_bytes(bytes.substr(0, length));
    report("truncated data, of every length", good && said("bytes of this plugin's data"));
    report("data too long", !from_bytes(bytes + '\0') && said("bytes of this plugin's data"));
    recorder.said.clear();
    report("no data", !Plugin(registered().deserializePlugin("nms", nullptr, 64)) && said("no data"));
    std::string other = bytes;
    other[0] ^= 1;
    report("data of another plugin", !from_bytes(other) && said("another plugin"));
    other = bytes, other[4] = 2;
    report("data of another version", !from_bytes(other) && said("version 2") && said("build the engine again"));
    other = bytes;
    const float wrong = 7;
    std::memcpy(&other[12], &wrong, 4);
    report("parameters that cannot be", !from_bytes(other) && said("iou_threshold must be from 0 to 1"));
    good = true;
    for (size_t i = 0; i < 8 * bytes.size(); ++i) {
        other = bytes, other[i / 8] ^= char(1 << i % 8);
        const Plugin odd = from_bytes(other);
        good = good && (odd ? bytes_of(*odd) == other : !recorder.said.empty());
    }
    report("any flipped bit is refused with a reason, or is what is read", good);
}

PluginTensorDesc described(std::vector<int> shape, DataType type, TensorFormat format = TensorFormat::kLINEAR) {
    PluginTensorDesc desc{};
    desc.dims.nbDims = int(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) desc.dims.d[i] = shape[i];
    desc.type = type, desc.format = format;
    return desc;
}

// Boxes, scores and the four outputs.
std::vector<PluginTensorDesc> described(int batch, int boxes, int classes, int most, DataType type) {
    return {described({batch, boxes, 5}, type),    described({batch, boxes, classes}, type),
            described({batch, 1}, DataType::kINT32), described({batch, most, 5}, type),
            described({batch, most}, type),          described({batch, most}, DataType::kINT32)};
}

void types() {
    const Plugin made = usual().plugin();
    auto& plugin = static_cast<PluginBase&>(*made);
    auto supports = [&](std::vector<PluginTensorDesc>& all, int place) {
        return plugin.supportsFormatCombination(place, all.data(), 2, 4);
    };
    bool good = true;
    for (DataType type : {DataType::kINT32, DataType::kINT8}) {
        auto all = described(2, 10, 3, 100, type);
        good = good && !supports(all, 0);
    }
    for (DataType type : {DataType::kFLOAT, DataType::kHALF}) {
        const auto right = described(2, 10, 3, 100, type);
        for (int place = 0; place < 6; ++place) {
            auto all = right;
            good = good && supports(all, place);
            all[place].format = TensorFormat::kCHW32;
            good = good && !supports(all, place);
            all = right;
            all[place].type = type == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
            good = good && (place == 0 || !supports(all, place));
        }
    }
    report("all float32 or all float16, linear", good);
    const DataType half[2] = {DataType::kHALF, DataType::kHALF};
    report("types of outputs", plugin.getNbOutputs() == 4 && plugin.getOutputDataType(0, half, 2) == DataType::kINT32 &&
                                   plugin.getOutputDataType(1, half, 2) == DataType::kHALF &&
                                   plugin.getOutputDataType(2, half, 2) == DataType::kHALF &&
                                   plugin.getOutputDataType(3, half, 2) == DataType::kINT32);
}

template <typename T>
std::vector<T> coded(const std::vector<float>& values) {
    std::vector<T> result;
    for (float value : values) result.push_back(from_float<T>(value));
    return result;
}

template <typename T>
std::vector<float> decoded(const std::vector<T>& values) {
    std::vector<float> result;
    for (T value : values) result.push_back(as_float(value));
    return result;
}

template <typename T>
void run(const std::string& name, DataType type) {
    const int most = 40;
    const Plugin made = usual().with("max_output_boxes", most).plugin();
    auto& plugin = static_cast<PluginBase&>(*made);
    Scene scene = scene_of(2, 150, 3, 1, {300, 12, -1, true});
    const std::vector<T> boxes = coded<T>(scene.box_data), scores = coded<T>(scene.score_data);
    scene.box_data = decoded(boxes), scene.score_data = decoded(scores);
    auto descs = described(2, 150, 3, most, type);
    Output found{std::vector<int>(2, 9), std::vector<int>(2 * most, 9), {}, {}};
    std::vector<T> out_boxes(2 * most * 5), out_scores(2 * most);
    std::vector<char> workspace(plugin.getWorkspaceSize(descs.data(), 2, descs.data() + 2, 4) + 16);
    void* aligned = &workspace[size_t(-reinterpret_cast<intptr_t>(workspace.data()) & 15)];
    const void* inputs[] = {boxes.data(), scores.data()};
    void* outputs[] = {found.num.data(), out_boxes.data(), out_scores.data(), found.classes.data()};
    recorder.said.clear();
    bool good = !plugin.enqueue(descs.data(), descs.data() + 2, inputs, outputs, aligned, nullptr);
    found.boxes = decoded(out_boxes), found.scores = decoded(out_scores);
    const Output expected = by_definition({0.05f, 0.3f, most, -1, 0, 0, 0}, scene);
    report("runs in " + name, good && recorder.said.empty() && found == expected && found.num[0] > 5);

    descs[1].dims.d[1] = 149;
    good = plugin.enqueue(descs.data(), descs.data() + 2, inputs, outputs, aligned, nullptr) != 0;
    report("boxes and scores of different numbers, in " + name, good && said("takes boxes [batch, boxes, 5]"));
}

}  // namespace
}  // namespace enr

int main() {
    using namespace enr;
    creator();
    attributes();
    serialization();
    types();
    run<float>("float32", DataType::kFLOAT);
    run<Half>("float16", DataType::kHALF);
    std::printf("%s\n", failures ? "FAILED" : "all ok");
    return failures != 0;
}
