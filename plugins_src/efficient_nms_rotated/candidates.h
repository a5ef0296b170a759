// Numbers that order candidates, for the GPU and for the CPU: half precision, scores, sort keys.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "rotated_iou.h"

namespace enr {

// IEEE half precision as it lies in memory.
struct Half {
    uint16_t bits;
};

template <typename To, typename From>
ENR_HD inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &value, sizeof to);
    return to;
}

ENR_HD inline float as_float(float value) { return value; }

// Exact.
ENR_HD inline float as_float(Half half) {
    const uint32_t sign = uint32_t(half.bits & 0x8000) << 16, magnitude_bits = half.bits & 0x7fff;
    if (magnitude_bits >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (magnitude_bits & 0x3ff) << 13);
    // Moved to float32's place for the exponent and scaled from one bias to the other; also right for subnormals.
    return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude_bits << 13) * 0x1p112f));
}

template <typename T>
ENR_HD T from_float(float value);

template <>
ENR_HD inline float from_float<float>(float value) {
    return value;
}

// Rounded to nearest, ties to even.
template <>
ENR_HD inline Half from_float<Half>(float value) {
    const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
    if (size < 0x38800000) {
        // Below half's normal range: adding 0.5 leaves float32 just the bits that half has.
        return {uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000u))};
    }
    return {uint16_t(sign | (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13)};
}

// In float64, rounded once: the same wherever it is computed.
ENR_HD inline float sigmoid(float logit) { return float(1 / (1 + exp(-double(logit)))); }

// A logit at or below this has no sigmoid above `threshold`; so that few sigmoids are computed.
inline float least_logit(float threshold) {
    const double below = double(threshold) - 1.2e-7 * std::fabs(double(threshold)) - 1e-45;
    if (!(below > 0)) return -INFINITY;
    if (below >= 1) return INFINITY;
    const double logit = std::log(below / (1 - below));
    return float(logit - 1e-5 * (1 + std::fabs(logit)));
}

// Keys rise as scores fall; equal scores are ordered by their index.  Scores are not NaN.
ENR_HD inline uint64_t score_key(float score, uint32_t index) {
    const uint32_t bits = bits_as<uint32_t>(score + 0.f);  // -0 is 0
    const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t(~rising) << 32 | index;
}

ENR_HD inline float score_of(uint64_t key) {
    const uint32_t rising = ~uint32_t(key >> 32);
    return bits_as<float>(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

ENR_HD inline uint32_t index_of(uint64_t key) { return uint32_t(key); }

// Behind every real key.
constexpr uint64_t kNoKey = ~uint64_t(0);

}  // namespace enr
