// Attributes of the node, and bytes of an engine, to parameters and back.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "../efficient_nms_rotated.h"
#include "trt_api.h"

namespace enr {

struct Attribute {
    const char* name;
    nvinfer1::PluginFieldType type;
    bool required;
    float enr_params::* real;
    int enr_params::* whole;
};

inline const Attribute kAttributes[] = {
    {"score_threshold", nvinfer1::PluginFieldType::kFLOAT32, true, &enr_params::score_threshold, nullptr},
    {"iou_threshold", nvinfer1::PluginFieldType::kFLOAT32, true, &enr_params::iou_threshold, nullptr},
    {"max_output_boxes", nvinfer1::PluginFieldType::kINT32, true, nullptr, &enr_params::max_output_boxes},
    {"background_class", nvinfer1::PluginFieldType::kINT32, false, nullptr, &enr_params::background_class},
    {"score_activation", nvinfer1::PluginFieldType::kINT32, false, nullptr, &enr_params::score_activation},
    {"class_agnostic", nvinfer1::PluginFieldType::kINT32, false, nullptr, &enr_params::class_agnostic},
    {"pre_nms_topk", nvinfer1::PluginFieldType::kINT32, false, nullptr, &enr_params::pre_nms_topk},
};

// What is wrong with parameters, whatever the sizes; empty where nothing is.
inline std::string fault_of(const enr_params& params) {
    const int error = enr_check(&params, 1, 1, 1, ENR_FLOAT32);
    return error ? enr_error(error) : "";
}

// Parameters from attributes; returns what is wrong with them, empty where nothing is.
inline std::string read_attributes(const nvinfer1::PluginFieldCollection* fields, enr_params& params) {
    params = {0, 0, 0, -1, 0, 0, 0};
    if (!fields || (fields->nbFields > 0 && !fields->fields)) return "no attributes";
    for (const Attribute& attribute : kAttributes) {
        const nvinfer1::PluginField* found = nullptr;
        for (int i = 0; i < fields->nbFields; ++i) {
            const nvinfer1::PluginField& field = fields->fields[i];
            // A parser may pass what the node has not, without a value.
            if (field.name && field.data && field.length > 0 && !std::strcmp(field.name, attribute.name))
                found = &field;
        }
        const std::string name = attribute.name;
        if (!found && attribute.required) return name + " is missing";
        if (!found) continue;
        if (found->type != attribute.type || found->length != 1)
            return name + (attribute.real ? " must be one float32" : " must be one int32");
        if (attribute.real)
            std::memcpy(&(params.*attribute.real), found->data, sizeof(float));
        else
            std::memcpy(&(params.*attribute.whole), found->data, sizeof(int));
    }
    return fault_of(params);
}

// In an engine: magic, version, and the parameters in the order of `kAttributes`; 4 bytes each.
constexpr uint32_t kMagic = 0x524d4e45, kVersion = 1;
constexpr size_t kSerialized = (2 + sizeof kAttributes / sizeof *kAttributes) * 4;

inline void write_serialized(const enr_params& params, void* buffer) {
    char* to = static_cast<char*>(buffer);
    auto put = [&](const auto& value) {
        static_assert(sizeof value == 4, "");
        std::memcpy(to, &value, 4);
        to += 4;
    };
    put(kMagic);
    put(kVersion);
    for (const Attribute& attribute : kAttributes)
        if (attribute.real)
            put(params.*attribute.real);
        else
            put(params.*attribute.whole);
}

// Returns what is wrong with the bytes, empty where nothing is.
inline std::string read_serialized(const void* buffer, size_t length, enr_params& params) {
    if (!buffer || length < 8) return "an engine holds no data of this plugin";
    const char* from = static_cast<const char*>(buffer);
    auto take = [&](auto& value) {
        std::memcpy(&value, from, 4);
        from += 4;
    };
    uint32_t magic, version;
    take(magic);
    take(version);
    if (magic != kMagic) return "an engine holds data of another plugin";
    if (version != kVersion)
        return "an engine was built with version " + std::to_string(version) + " of this plugin's data, this is " +
               std::to_string(kVersion) + ": build the engine again";
    if (length != kSerialized)
        return "an engine holds " + std::to_string(length) + " bytes of this plugin's data instead of " +
               std::to_string(kSerialized);
    params = {};
    for (const Attribute& attribute : kAttributes)
        if (attribute.real)
            take(params.*attribute.real);
        else
            take(params.*attribute.whole);
    return fault_of(params);
}

}  // namespace enr
