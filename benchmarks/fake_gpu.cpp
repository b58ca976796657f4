// A CUDA device that does nothing, for fake_gpu.py: with it a build without CUDA indexes and differentiates tensors that
// say they are on "cuda". Nothing is allocated there and nothing runs; torch's fake tensors have shapes and no numbers.
// Pinned memory is the CPU's ordinary memory, remembered.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <unordered_set>

namespace c10::impl {
namespace {

const Device kDevice(DeviceType::CUDA, 0);

struct FakeGuard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return kDevice; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

}  // namespace
}  // namespace c10::impl

namespace at {
namespace {

struct PinnedAllocator final : Allocator {
  DataPtr allocate(size_t size) override {
    void* data = GetCPUAllocator()->raw_allocate(size);
    const std::lock_guard<std::mutex> lock(mutex);
    pinned.insert(data);
    return {data, data, &release, DeviceType::CPU};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  static void release(void* data) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      pinned.erase(data);
    }
    GetCPUAllocator()->raw_deallocate(data);
  }
  static bool has(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    return pinned.count(const_cast<void*>(data)) > 0;
  }

  static inline std::mutex mutex;
  static inline std::unordered_set<void*> pinned;
};

PinnedAllocator pinned_allocator;

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::has(data); }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace
}  // namespace at
