// TensorRT's headers, and which plugin interface is used: the only place that looks at the version.
//
// IPluginV2DynamicExt is in 8.6, 10 and 11.1 alike, since 10.0 as deprecated; all of them parse, build, serialize and
// run it.  IPluginV3, which 8.6 has not, would be a second wrapper without a use.  A header without V2 ends the
// compilation here.
#pragma once

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#endif
#include <NvInfer.h>
#include <NvInferVersion.h>

#if NV_TENSORRT_MAJOR < 8 || (NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR < 6)
#error "TensorRT 8.6 or newer is needed"
#endif

#include <string>

namespace enr {

using PluginBase = nvinfer1::IPluginV2DynamicExt;
using CreatorBase = nvinfer1::IPluginCreator;

// To the logger of the builder or runtime in use.
inline void log_error(const std::string& what) {
    if (nvinfer1::ILogger* logger = getLogger())
        logger->log(nvinfer1::ILogger::Severity::kERROR, ("EfficientNMSRotated_TRT: " + what).c_str());
}

}  // namespace enr
