// IoU of rotated boxes, for the GPU and for the CPU, and whether one box suppresses another.
//
// In the frame of box b, which is |x| <= w/2, |y| <= h/2, the area common to a and b is by Green's theorem the integral
// of -clamp(y) dx along the outline of a, as far as it lies within |x| <= w/2: a sum over four edges, continuous in all
// arguments, so that touching, equal and parallel boxes are no special cases.  alignment/nms/rotated.py has it in NumPy.
//
// Error of the float32 value.  u = 2^-24 is the unit roundoff.  Offsets between the centres and between the angles are
// taken first, so that neither large coordinates nor nearly equal angles lose digits.  A corner of a in the frame of b
// is then off by at most (7 + |turn|) u r, where r = |dx| + |dy| + (w + h of a) / 2 bounds its distance and turn is the
// angle between the boxes: one rounding of each offset, 2 u of sine and cosine, two products and three sums.  What is
// summed is the integral along the outline through those corners, again closed, whose ordinates are off by some 6 u r
// more.  An ordinate off by d moves the area by d dx, and |dx| sums up to 2 w; an abscissa off by d moves it by d |y|.
// In all the common area is off by less than
//     (13 + |turn|) u r p + 8 u w h,     p = 2 (w + h) of b,
// and IoU, whose derivative by the common area is at most 2 / union, by `bound` below.  A pair of unlike boxes of
// aspect ratio 2 has a bound of some 2e-5 and an error of some 1e-7: where that decides, `suppresses` takes float64.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define ENR_HD __host__ __device__
#define ENR_COLD __host__ __device__ __noinline__
#else
#define ENR_HD
#define ENR_COLD __attribute__((noinline))
#endif

namespace enr {

// Angle in radians from the x axis towards the y axis: clockwise on a screen.
struct Box {
    float x, y, w, h, angle;
};

// The upright rectangle around a box, rounded outwards.
struct alignas(16) Bounds {
    float x1, y1, x2, y2;
};

// An IoU and how far it can be off.
struct Approximate {
    float iou, bound;
};

// Boxes with a smaller area overlap nothing (mmcv's box_iou_rotated_utils.hpp).
constexpr double kMinArea = 1e-14;
constexpr float kRoundoff = 1.f / (1 << 24);

// The compiler's own functions: std::fmin and the like are not for the GPU.
ENR_HD inline float smaller(float a, float b) { return a < b ? a : b; }
ENR_HD inline double smaller(double a, double b) { return a < b ? a : b; }
ENR_HD inline float larger(float a, float b) { return a > b ? a : b; }
ENR_HD inline double larger(double a, double b) { return a > b ? a : b; }
ENR_HD inline float magnitude(float a) { return fabsf(a); }
ENR_HD inline double magnitude(double a) { return fabs(a); }
ENR_HD inline void sine_cosine(float angle, float& sine, float& cosine) {
    sine = sinf(angle);
    cosine = cosf(angle);
}
ENR_HD inline void sine_cosine(double angle, double& sine, double& cosine) {
    sine = sin(angle);
    cosine = cos(angle);
}

template <typename T>
ENR_HD inline T clamped(T value, T low, T high) {
    return smaller(larger(value, low), high);
}

// part / whole within [0, 1]; something in there where whole is 0.
template <typename T>
ENR_HD inline T fraction(T part, T whole) {
    return clamped(part / (whole == 0 ? T(1) : whole), T(0), T(1));
}

// The integral of -clamp(y) dx along one edge, as far as it lies within |x| <= half_w.
template <typename T>
ENR_HD inline T along_edge(T x0, T y0, T x1, T y1, T half_w, T half_h) {
    // What lies beyond |x| = half_w is pushed onto it, where it encloses nothing.
    const T from = clamped(x0, -half_w, half_w), to = clamped(x1, -half_w, half_w);
    const T step_x = x1 - x0, step_y = y1 - y0;
    const T start = y0 + step_y * fraction(from - x0, step_x), end = y0 + step_y * fraction(to - x0, step_x);
    // Along an edge clamp(y) is level, then linear, then level: a mean of its ends, weighted by the levels.
    const T rise = end - start;
    const T weight = (fraction(-half_h - start, rise) + fraction(half_h - start, rise)) / 2;
    const T mean = clamped(start, -half_h, half_h) * weight + clamped(end, -half_h, half_h) * (1 - weight);
    return (from - to) * mean;
}

template <typename T>
ENR_HD inline T common_area(const Box& a, const Box& b) {
    const T dx = T(a.x) - T(b.x), dy = T(a.y) - T(b.y);
    const T half_w = magnitude(T(b.w)) / 2, half_h = magnitude(T(b.h)) / 2;
    const T u = magnitude(T(a.w)) / 2, v = magnitude(T(a.h)) / 2;
    T sin_b, cos_b, sin_turn, cos_turn;
    sine_cosine(T(b.angle), sin_b, cos_b);
    sine_cosine(T(a.angle) - T(b.angle), sin_turn, cos_turn);
    const T x = dx * cos_b + dy * sin_b, y = dy * cos_b - dx * sin_b;
    const T along_x = u * cos_turn, along_y = u * sin_turn, across_x = -v * sin_turn, across_y = v * cos_turn;
    const T x0 = x - along_x - across_x, y0 = y - along_y - across_y;
    const T x1 = x + along_x - across_x, y1 = y + along_y - across_y;
    const T x2 = x + along_x + across_x, y2 = y + along_y + across_y;
    const T x3 = x - along_x + across_x, y3 = y - along_y + across_y;
    return along_edge(x0, y0, x1, y1, half_w, half_h) + along_edge(x1, y1, x2, y2, half_w, half_h) +
           along_edge(x2, y2, x3, y3, half_w, half_h) + along_edge(x3, y3, x0, y0, half_w, half_h);
}

template <typename T>
ENR_HD inline T iou_of_areas(T common, T area_a, T area_b) {
    common = clamped(common, T(0), smaller(area_a, area_b));
    return common / (area_a + area_b - common);
}

// Whether a box has IoU 0 with every box: without area, or with a coordinate that is not finite.
ENR_HD inline bool overlaps_nothing(const Box& box) {
    const float sum = box.x + box.y + box.w + box.h + box.angle;
    if (!(magnitude(sum) <= 3e38f)) {
        // Also where only the sum overflows: look at each.
        const float values[5] = {box.x, box.y, box.w, box.h, box.angle};
        for (int i = 0; i < 5; ++i)
            if (!(magnitude(values[i]) <= 3.402823466e38f)) return true;
    }
    return double(box.w) * double(box.h) < kMinArea;
}

// IoU in float32 of two boxes that overlap something, and its error bound; NaN where float32 overflows.
ENR_HD inline Approximate approximate_iou(const Box& a, const Box& b) {
    const float area_a = a.w * a.h, area_b = b.w * b.h;
    const float iou = iou_of_areas(common_area<float>(a, b), area_a, area_b);
    const float reach = magnitude(a.x - b.x) + magnitude(a.y - b.y) + (magnitude(a.w) + magnitude(a.h)) / 2;
    const float outline = 2 * (magnitude(b.w) + magnitude(b.h));
    const float turn = magnitude(a.angle - b.angle), area = larger(area_a, area_b);
    return {iou, 2 * kRoundoff * ((13 + turn) * reach * (outline / area) + 16)};
}

// IoU in float64, 0 for a box that overlaps nothing: what alignment/nms/rotated.py computes.
ENR_COLD inline double exact_iou(const Box& a, const Box& b) {
    if (overlaps_nothing(a) || overlaps_nothing(b)) return 0;
    double sin_a, cos_a, sin_b, cos_b;
    sine_cosine(double(a.angle), sin_a, cos_a);
    sine_cosine(double(b.angle), sin_b, cos_b);
    sin_a = magnitude(sin_a), cos_a = magnitude(cos_a), sin_b = magnitude(sin_b), cos_b = magnitude(cos_b);
    const double wa = magnitude(double(a.w)) / 2, ha = magnitude(double(a.h)) / 2;
    const double wb = magnitude(double(b.w)) / 2, hb = magnitude(double(b.h)) / 2;
    if (magnitude(double(a.x) - b.x) > (wa * cos_a + ha * sin_a) + (wb * cos_b + hb * sin_b)) return 0;
    if (magnitude(double(a.y) - b.y) > (wa * sin_a + ha * cos_a) + (wb * sin_b + hb * cos_b)) return 0;
    return iou_of_areas(common_area<double>(a, b), double(a.w) * double(a.h), double(b.w) * double(b.h));
}

// Where float32 alone is good enough, and so the error bound of `rotated_iou`.
constexpr float kGoodEnough = 2e-5f;

// IoU of any two boxes: in float32 where its bound is small, else, as of very long thin boxes, by float64.
ENR_HD inline float rotated_iou(const Box& a, const Box& b) {
    if (overlaps_nothing(a) || overlaps_nothing(b)) return 0;
    const Approximate near = approximate_iou(a, b);
    return near.bound <= kGoodEnough && near.iou <= 1 ? near.iou : float(exact_iou(a, b));
}

// Whether the float32 nearest to the IoU exceeds the threshold.  Of boxes that overlap something.
ENR_HD inline bool suppresses(const Box& a, const Box& b, float threshold) {
    const Approximate near = approximate_iou(a, b);
    // Also where float32 overflowed and the left side is no number.
    if (!(magnitude(near.iou - threshold) > near.bound)) return float(exact_iou(a, b)) > threshold;
    return near.iou > threshold;
}

// Bounds that no rounding makes too small; of a box that overlaps nothing they meet none.
ENR_HD inline Bounds bounds_of(const Box& box) {
    if (overlaps_nothing(box)) return {INFINITY, INFINITY, -INFINITY, -INFINITY};
    float sine, cosine;
    sine_cosine(box.angle, sine, cosine);
    const float w = magnitude(box.w), h = magnitude(box.h);
    const float reach_x = (w * magnitude(cosine) + h * magnitude(sine)) / 2;
    const float reach_y = (w * magnitude(sine) + h * magnitude(cosine)) / 2;
    const float slack = 16 * kRoundoff * (magnitude(box.x) + magnitude(box.y) + w + h);
    return {box.x - reach_x - slack, box.y - reach_y - slack, box.x + reach_x + slack, box.y + reach_y + slack};
}

ENR_HD inline bool meet(const Bounds& a, const Bounds& b) {
    return a.x1 <= b.x2 && b.x1 <= a.x2 && a.y1 <= b.y2 && b.y1 <= a.y2;
}

}  // namespace enr
