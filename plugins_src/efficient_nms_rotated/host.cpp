// The part of the C API that needs no GPU.
#include "candidates.h"
#include "efficient_nms_rotated.h"

namespace {

enr::Box box_of(const float* values) { return {values[0], values[1], values[2], values[3], values[4]}; }

}  // namespace

extern "C" {

float enr_iou_host(const float a[5], const float b[5]) { return enr::rotated_iou(box_of(a), box_of(b)); }

void enr_ious_host(const float* a, const float* b, size_t count, float iou_threshold, float* iou, float* float32,
                   float* bound, unsigned char* suppressed) {
    for (size_t i = 0; i < count; ++i) {
        const enr::Box one = box_of(a + 5 * i), other = box_of(b + 5 * i);
        const bool apart = enr::overlaps_nothing(one) || enr::overlaps_nothing(other);
        const enr::Approximate found = apart ? enr::Approximate{0, 0} : enr::approximate_iou(one, other);
        if (iou) iou[i] = enr::rotated_iou(one, other);
        if (float32) float32[i] = found.iou;
        if (bound) bound[i] = found.bound;
        if (suppressed) {
            const bool near = enr::meet(enr::bounds_of(one), enr::bounds_of(other));
            suppressed[i] = near && enr::suppresses(one, other, iou_threshold);
        }
    }
}

}  // extern "C"
