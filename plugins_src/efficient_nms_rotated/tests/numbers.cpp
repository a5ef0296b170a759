// The numbers of candidates.h, many at a time, for a test to call.
#include "../candidates.h"

extern "C" {

void floats_of_halves(const uint16_t* halves, float* floats, size_t count) {
    for (size_t i = 0; i < count; ++i) floats[i] = enr::as_float(enr::Half{halves[i]});
}

void halves_of_floats(const float* floats, uint16_t* halves, size_t count) {
    for (size_t i = 0; i < count; ++i) halves[i] = enr::from_float<enr::Half>(floats[i]).bits;
}

void least_logits(const float* thresholds, float* logits, size_t count) {
    for (size_t i = 0; i < count; ++i) logits[i] = enr::least_logit(thresholds[i]);
}

void sigmoids(const float* logits, float* scores, size_t count) {
    for (size_t i = 0; i < count; ++i) scores[i] = enr::sigmoid(logits[i]);
}

void score_keys(const float* scores, const uint32_t* indices, uint64_t* keys, float* scores_again, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        keys[i] = enr::score_key(scores[i], indices[i]);
        scores_again[i] = enr::score_of(keys[i]);
    }
}

}  // extern "C"
