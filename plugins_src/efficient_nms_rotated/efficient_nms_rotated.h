/* Rotated non-maximum suppression on the GPU, over plain device pointers.
 *
 * A pair (box, class) is a candidate when its score exceeds score_threshold and its class is not background_class.
 * Candidates go by falling score, equal ones by box and class; the first pre_nms_topk of them go on.  One is suppressed
 * when the IoU with an earlier kept one, of its own class or, with class_agnostic, of any, exceeds iou_threshold.  The
 * first max_output_boxes that are kept are written, in that order.
 *
 * Float16 is computed in float32.  A score that is NaN is no candidate.  A box with a coordinate that is not finite or
 * with an area below 1e-14 overlaps nothing.  IoU is compared as the float32 nearest to its float64 value.
 */
#ifndef EFFICIENT_NMS_ROTATED_H
#define EFFICIENT_NMS_ROTATED_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ENR_API __attribute__((visibility("default")))

typedef struct enr_params {
    float score_threshold;
    float iou_threshold;  /* 0 to 1 */
    int max_output_boxes; /* 1 or more */
    int background_class; /* -1: none */
    int score_activation; /* 1: scores are logits, and become sigmoids before anything else */
    int class_agnostic;   /* 1: classes suppress each other */
    int pre_nms_topk;     /* of an image's (box, class) pairs; 0: all */
} enr_params;

enum { ENR_FLOAT32 = 0, ENR_FLOAT16 = 1 };

/* 0, or what is wrong with these parameters or sizes; for enr_error.  boxes * classes may be 2^30
 * at most, batch 65535, and the product of all three 2^35. */
ENR_API int enr_check(const enr_params* params, int batch, int boxes, int classes, int dtype);

/* Bytes of device memory that enr_run needs; 0 where enr_check finds fault. */
ENR_API size_t enr_workspace_bytes(const enr_params* params, int batch, int boxes, int classes, int dtype);

/* Enqueues the work on `stream` (a cudaStream_t), without waiting; may be captured into a CUDA graph.
 *
 * boxes [batch, boxes, 5]: centre x, y, width, height, angle in radians from the x towards the y axis; scores [batch,
 * boxes, classes]; both of dtype.  num_detections [batch] int32; detection_boxes [batch, max_output_boxes, 5] and
 * detection_scores [batch, max_output_boxes] of dtype, 0 where there is no detection; detection_classes [batch,
 * max_output_boxes] int32, -1 there.  workspace is aligned to 16 bytes and needs no initial value.
 *
 * Returns 0 or an error for enr_error.
 */
ENR_API int enr_run(const enr_params* params, int batch, int boxes, int classes, int dtype, const void* boxes_data,
                    const void* scores_data, int* num_detections, void* detection_boxes, void* detection_scores,
                    int* detection_classes, void* workspace, size_t workspace_bytes, void* stream);

/* An error in words. */
ENR_API const char* enr_error(int error);

/* IoU of two boxes on the CPU, off by at most 2e-5: rotated_iou.h says why. */
ENR_API float enr_iou_host(const float a[5], const float b[5]);

/* Of `count` pairs, a and b [count, 5], each where it is not null: iou [count] as enr_iou_host gives it; float32 [count]
 * as float32 alone gives it, and bound [count], how far that can be off; suppressed [count]: whether the kernels take
 * the IoU to exceed iou_threshold. */
ENR_API void enr_ious_host(const float* a, const float* b, size_t count, float iou_threshold, float* iou,
                           float* float32, float* bound, unsigned char* suppressed);

#ifdef __cplusplus
}
#endif
#endif
