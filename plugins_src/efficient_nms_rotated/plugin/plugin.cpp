// EfficientNMSRotated_TRT: the C API as a TensorRT plugin.
//
// Inputs boxes [B, N, 5] and scores [B, N, C], outputs num_detections [B, 1] int32, detection_boxes [B, M, 5],
// detection_scores [B, M] and detection_classes [B, M] int32; M is max_output_boxes.  Boxes and scores are all float32
// or all float16, linear.
#include <new>

#include "parameters.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#endif

using namespace nvinfer1;

namespace enr {
namespace {

constexpr char kName[] = "EfficientNMSRotated_TRT", kPluginVersion[] = "1";
constexpr int kInputs = 2, kOutputs = 4;
enum Output { kNumDetections, kBoxes, kScores, kClasses };

bool is_int32(int output) { return output == kNumDetections || output == kClasses; }

int dtype_of(DataType type) { return type == DataType::kHALF ? ENR_FLOAT16 : ENR_FLOAT32; }

class EfficientNMSRotated final : public PluginBase {
  public:
    explicit EfficientNMSRotated(const enr_params& params) noexcept : params_(params) {}

    const char* getPluginType() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    int32_t getNbOutputs() const noexcept override { return kOutputs; }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    size_t getSerializationSize() const noexcept override { return kSerialized; }
    void serialize(void* buffer) const noexcept override { write_serialized(params_, buffer); }
    void setPluginNamespace(const char* name) noexcept override { namespace_ = name ? name : ""; }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    PluginBase* clone() const noexcept override {
        auto* copy = new (std::nothrow) EfficientNMSRotated(params_);
        if (copy) copy->setPluginNamespace(namespace_.c_str());
        return copy;
    }

    DataType getOutputDataType(int32_t index, const DataType* inputs, int32_t) const noexcept override {
        return is_int32(index) ? DataType::kINT32 : inputs[0];
    }

    DimsExprs getOutputDimensions(int32_t index, const DimsExprs* inputs, int32_t count,
                                  IExprBuilder& builder) noexcept override {
        DimsExprs output{};
        if (count != kInputs || inputs[0].nbDims != 3 || inputs[1].nbDims != 3 ||
            (inputs[0].d[2]->isConstant() && inputs[0].d[2]->getConstantValue() != 5)) {
            log_error("takes boxes [batch, boxes, 5] and scores [batch, boxes, classes]");
            output.nbDims = -1;
            return output;
        }
        output.nbDims = index == kBoxes ? 3 : 2;
        output.d[0] = inputs[0].d[0];
        output.d[1] = builder.constant(index == kNumDetections ? 1 : params_.max_output_boxes);
        if (index == kBoxes) output.d[2] = builder.constant(5);
        return output;
    }

    bool supportsFormatCombination(int32_t position, const PluginTensorDesc* all, int32_t inputs,
                                   int32_t outputs) noexcept override {
        if (inputs != kInputs || outputs != kOutputs || all[position].format != TensorFormat::kLINEAR) return false;
        const DataType type = all[position].type;
        if (position == 0) return type == DataType::kFLOAT || type == DataType::kHALF;
        const bool whole = position >= kInputs && is_int32(position - kInputs);
        return type == (whole ? DataType::kINT32 : all[0].type);
    }

    void configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                         int32_t) noexcept override {
        // Sizes that cannot work show when the engine is built, not when it runs.
        fault(inputs[0].max, inputs[1].max, inputs[0].desc.type);
    }

    size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*,
                            int32_t) const noexcept override {
        const Dims& scores = inputs[1].dims;
        return enr_workspace_bytes(&params_, int(scores.d[0]), int(scores.d[1]), int(scores.d[2]),
                                   dtype_of(inputs[0].type));
    }

    int32_t enqueue(const PluginTensorDesc* descs, const PluginTensorDesc* output_descs, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        if (fault(descs[0].dims, descs[1].dims, descs[0].type)) return 1;
        const Dims& scores = descs[1].dims;
        const int error =
            enr_run(&params_, int(scores.d[0]), int(scores.d[1]), int(scores.d[2]), dtype_of(descs[0].type), inputs[0],
                    inputs[1], static_cast<int*>(outputs[kNumDetections]), outputs[kBoxes], outputs[kScores],
                    static_cast<int*>(outputs[kClasses]), workspace, getWorkspaceSize(descs, 2, output_descs, 4),
                    stream);
        if (error) log_error(enr_error(error));
        return error != 0;
    }

  private:
    // Whether boxes and scores of these shapes cannot be taken; says why.
    bool fault(const Dims& boxes, const Dims& scores, DataType type) const noexcept {
        const bool fit = boxes.nbDims == 3 && scores.nbDims == 3 && boxes.d[2] == 5 && boxes.d[0] == scores.d[0] &&
                         boxes.d[1] == scores.d[1];
        if (!fit) {
            log_error("takes boxes [batch, boxes, 5] and scores [batch, boxes, classes] of as many boxes");
            return true;
        }
        const int error = enr_check(&params_, int(scores.d[0]), int(scores.d[1]), int(scores.d[2]), dtype_of(type));
        if (error) log_error(enr_error(error));
        return error != 0;
    }

    enr_params params_;
    std::string namespace_;
};

class Creator final : public CreatorBase {
  public:
    Creator() noexcept {
        for (const Attribute& attribute : kAttributes)
            fields_[count_++] = PluginField{attribute.name, nullptr, attribute.type, 1};
        collection_.nbFields = count_, collection_.fields = fields_;
    }

    const char* getPluginName() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    void setPluginNamespace(const char* name) noexcept override { namespace_ = name ? name : ""; }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    IPluginV2* createPlugin(const char*, const PluginFieldCollection* fields) noexcept override {
        enr_params params;
        return made(read_attributes(fields, params), params);
    }

    IPluginV2* deserializePlugin(const char*, const void* data, size_t length) noexcept override {
        enr_params params;
        return made(read_serialized(data, length, params), params);
    }

  private:
    IPluginV2* made(const std::string& fault, const enr_params& params) const noexcept {
        if (!fault.empty()) {
            log_error(fault);
            return nullptr;
        }
        auto* plugin = new (std::nothrow) EfficientNMSRotated(params);
        if (plugin) plugin->setPluginNamespace(namespace_.c_str());
        return plugin;
    }

    PluginField fields_[sizeof kAttributes / sizeof *kAttributes];
    int count_ = 0;
    PluginFieldCollection collection_{};
    std::string namespace_;
};

REGISTER_TENSORRT_PLUGIN(Creator);

}  // namespace
}  // namespace enr
