// In place of CUDA's runtime and of torch's half that knows GPUs: what the CUDA library asks of them, for tensors on the CPU.
// A launch is handed to Python.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>
#include <unordered_map>

namespace {

void (*launch)(const char* kernel, unsigned x, unsigned y, unsigned threads, void* arguments);
void (*allocate)(void* data, int64_t bytes);

std::unordered_map<const void*, std::string>& kernels() {
  static std::unordered_map<const void*, std::string> names;
  return names;
}

}  // namespace

extern "C" {

void machine_is(decltype(launch) to_launch, decltype(allocate) to_allocate) {
  launch = to_launch;
  allocate = to_allocate;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = device;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  launch(kernels().at(kernel).c_str(), grid.x, grid.y, block.x, arguments[0]);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaErrorNotSupported; }

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  static char text[] = "CUDA's runtime is not here, and the machine has no such call";
  *message = error ? text : nullptr;
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char*) {}

AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                                        int32_t, AtenTensorHandle* tensor) {
  static const auto torchs = reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(RTLD_NEXT, __func__));
  const AOTITorchError error = torchs(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, tensor);
  void* data;
  int64_t bytes;
  if (error || aoti_torch_get_data_ptr(*tensor, &data) || aoti_torch_get_storage_size(*tensor, &bytes)) return 1;
  allocate(data, bytes);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
