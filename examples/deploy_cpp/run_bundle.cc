// Runs a bundle on a board that has TVM's runtime library, and neither Python nor a compiler.

#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/base.h>
#include <unistd.h>
#if defined(__aarch64__) || defined(__arm__)
#include <asm/hwcap.h>
#endif

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

constexpr const char* kUsage =
    "usage: run_bundle BUNDLE.topi [-i IN.npy]... [-o OUT.npy]... [--threads N] [--runs N]\n"
    "\n"
    "  -i         an input; once for each, in the order of the bundle's manifest. The first axis\n"
    "             may be a multiple of the compiled batch. Without any -i the inputs are zeros.\n"
    "  -o         where to write an output; likewise\n"
    "  --threads  default: what the bundle was compiled for\n"
    "  --runs     how many more runs are timed, after one for each batch; default: 10\n";

namespace ffi = tvm::ffi;
using Object = ffi::Map<ffi::String, ffi::Any>;
using Failure = std::runtime_error;  // its text is for the user

constexpr int64_t kSchema = 2;     // of manifest.json
constexpr size_t kAlignment = 64;  // bytes; generated code uses aligned vector moves
constexpr DLDevice kCpu{kDLCPU, 0};
constexpr int kPooledAllocator = 2;  // of TVM's virtual machine
constexpr int kBigCores = 1;         // of TVM's thread pool
constexpr size_t kElfMachine = 18;   // where an ELF file says what processor it is for

// ELF's number of this processor's kind, and its features as Linux names them and the kernel tells.
using Features = std::vector<std::pair<std::string, unsigned long>>;
#if defined(__aarch64__)
constexpr int kMachine = 183;
const Features kFeatures{{"fp", HWCAP_FP},           {"asimd", HWCAP_ASIMD},
                         {"fphp", HWCAP_FPHP},       {"asimdhp", HWCAP_ASIMDHP},
                         {"asimddp", HWCAP_ASIMDDP}, {"sve", HWCAP_SVE}};
#elif defined(__arm__)
constexpr int kMachine = 40;
const Features kFeatures{{"neon", HWCAP_NEON}, {"vfpv4", HWCAP_VFPv4}};
#elif defined(__x86_64__)
constexpr int kMachine = 62;
const Features kFeatures;
#endif

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), {}};
  if (!file.is_open()) throw Failure(path + " can't be read: " + std::strerror(errno));
  return content;
}

// Memory that starts aligned.
class Buffer {
 public:
  explicit Buffer(size_t size)  // a multiple of the alignment, and never nothing
      : data_(std::aligned_alloc(kAlignment, size / kAlignment * kAlignment + kAlignment)) {}
  char* data() const { return static_cast<char*>(data_.get()); }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<void, Free> data_;
};

// What an input, an output or a tensor of weights is.
struct Signature {
  explicit Signature(const Object& entry)
      : dtype(ffi::StringToDLDataType(entry["dtype"].cast<ffi::String>())) {
    for (int64_t size : entry["shape"].cast<ffi::Array<int64_t>>()) shape.push_back(size);
  }

  size_t Bytes() const {
    size_t bytes = dtype.bits / 8;
    for (int64_t size : shape) bytes *= static_cast<size_t>(size);
    return bytes;
  }

  ffi::Tensor At(char* data) const {
    struct Borrowed {
      void AllocData(DLTensor* tensor) { tensor->data = data; }
      void FreeData(DLTensor*) {}
      char* data;
    };
    return ffi::Tensor::FromNDAlloc(Borrowed{data}, ffi::Shape(shape), dtype, kCpu);
  }

  DLDataType dtype;
  std::vector<int64_t> shape;
};

std::vector<Signature> Signatures(const Object& manifest, const char* key) {
  std::vector<Signature> found;
  for (const Object& entry : manifest[key].cast<ffi::Array<Object>>()) found.emplace_back(entry);
  return found;
}

// The head of an .npy file: `{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }`.
std::string NpyHead(const Signature& is, size_t batches) {
  const char kind = "iuf???b"[is.dtype.code];
  std::string shape;
  for (size_t i = 0; i < is.shape.size(); ++i) {
    const size_t size = static_cast<size_t>(is.shape[i]) * (i == 0 ? batches : 1);
    shape += (i == 0 ? "" : " ") + std::to_string(size) + ",";
  }
  if (is.shape.size() > 1) shape.pop_back();
  return std::string("{'descr': '") + (is.dtype.bits == 8 ? '|' : '<') + kind +
         std::to_string(is.dtype.bits / 8) + "', 'fortran_order': False, 'shape': (" + shape +
         "), }";
}

// The values of an .npy file: one batch or several.
std::string ReadNpy(const std::string& path, const Signature& is) {
  const std::string file = ReadFile(path);
  if (file.size() < 10 || file.compare(0, 7, "\x93NUMPY\x01") != 0) {
    throw Failure(path + " is no .npy file of version 1");
  }
  const size_t head_size = uint8_t(file[8]) | uint8_t(file[9]) << 8;
  const size_t start = std::min(file.size(), 10 + head_size);
  std::string head = file.substr(10, head_size);
  head.erase(head.find_last_not_of(" \n") + 1);
  const size_t size = file.size() - start, batches = size / is.Bytes();
  if (batches == 0 || size % is.Bytes() != 0 || head != NpyHead(is, batches)) {
    throw Failure(path + " has " + head + " and " + std::to_string(size) +
                  " bytes; the network takes " + NpyHead(is, 1) + ", " +
                  std::to_string(is.Bytes()) + " bytes, or several of these on the first axis");
  }
  return file.substr(start);
}

void WriteNpy(const std::string& path, const Signature& is, const std::string& values) {
  std::string head = NpyHead(is, values.size() / is.Bytes());
  head.append(63 - (10 + head.size()) % 64, ' ').push_back('\n');
  std::ofstream file(path, std::ios::binary);
  file << "\x93NUMPY\x01" << '\0' << char(head.size() & 255) << char(head.size() >> 8) << head
       << values;
  file.close();
  if (!file) throw Failure(path + " can't be written: " + std::strerror(errno));
}

// `0.27.0.post1` -> `0.27.0`: the parts that compiled code depends on.
std::string Release(const std::string& version) {
  size_t end = 0;
  for (int parts = 0; parts < 3 && end != std::string::npos; ++parts) {
    end = version.find('.', end + (parts > 0));
  }
  return version.substr(0, end);
}

Object ReadManifest(const std::string& bundle) {
  const std::string path = bundle + "/manifest.json";
  ffi::String problem;
  const auto manifest = ffi::json::Parse(ReadFile(path), &problem).as<Object>();
  if (!manifest || !manifest->count("format") ||
      (*manifest)["format"].cast<std::string>() != "topiarist-bundle") {
    throw Failure(path + " is no manifest of a bundle " + std::string(problem));
  }
  if (const auto schema = (*manifest)["schema"].cast<int64_t>(); schema != kSchema) {
    throw Failure(bundle + " has the schema " + std::to_string(schema) +
                  " and this program reads " + std::to_string(kSchema) +
                  "; build the program that came with the compiler");
  }
  const auto tvm = (*manifest)["versions"].cast<Object>()["apache-tvm"].cast<std::string>();
  if (Release(tvm) != Release(TVM_VERSION)) {
    throw Failure(bundle + " was compiled with apache-tvm " + tvm +
                  " and this program is built with " TVM_VERSION +
                  "; build it with the runtime of the former");
  }
  return *manifest;
}

// A file of the bundle as memory; its pages come from the disk when they are used, and none is
// ever written. Throws Failure unless it has the size that it was written with.
class MappedFile {
 public:
  MappedFile(const std::string& bundle, const Object& manifest, const char* name)
      : path(bundle + "/" + name) {
    const int file = open(path.c_str(), O_RDONLY);
    if (file < 0) throw Failure(path + " can't be read: " + std::strerror(errno));
    size = static_cast<size_t>(lseek(file, 0, SEEK_END));
    const auto entry = manifest["files"].cast<Object>()[name].cast<Object>();
    if (const auto written = entry["size"].cast<int64_t>(); size != static_cast<size_t>(written)) {
      throw Failure(path + " has " + std::to_string(size) + " bytes and " +
                    std::to_string(written) + " were written; copy the bundle again");
    }
    void* const memory = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (memory == MAP_FAILED) throw Failure(path + " can't be mapped: " + std::strerror(errno));
    data = static_cast<char*>(memory);
    close(file);
  }
  ~MappedFile() { munmap(data, size); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string path;
  size_t size;
  char* data;
};

// Throws Failure when the code is for another kind of processor, or for a better one of this kind.
void CheckProcessor(const MappedFile& library, const Object& manifest) {
  const auto target = manifest["target"].cast<Object>();
  const auto name = target["name"].cast<std::string>();
  uint16_t machine;
  std::memcpy(&machine, library.data + kElfMachine, sizeof machine);
  if (machine != kMachine) {
    throw Failure(library.path + " is for another kind of processor: it was compiled for " + name +
                  " (ELF machine " + std::to_string(machine) + ", here it is " +
                  std::to_string(kMachine) + ")");
  }
  const unsigned long here = getauxval(AT_HWCAP);
  for (const ffi::String& needed : target["required_features"].cast<ffi::Array<ffi::String>>()) {
    for (const auto& [feature, bit] : kFeatures) {
      if (needed == feature && !(here & bit)) {
        throw Failure("this processor lacks " + feature + ", which code for " + name + " needs");
      }
    }
  }
}

ffi::Function Lookup(const ffi::Module& module, const char* name) {
  const auto function = module->GetFunction(name, true);
  if (!function) throw Failure(std::string("lib.so has no function ") + name);
  return *function;
}

// A bundle that is ready to run.
class Network {
 public:
  explicit Network(const std::string& bundle)
      : manifest(ReadManifest(bundle)),
        inputs(Signatures(manifest, "inputs")),
        outputs(Signatures(manifest, "outputs")),
        weights_(bundle, manifest, "weights.bin") {
    const MappedFile library(bundle, manifest, "lib.so");
    CheckProcessor(library, manifest);
    for (const Signature& is : inputs) {
      buffers_.emplace_back(is.Bytes());
      arguments_.push_back(is.At(buffers_.back().data()));
    }
    arguments_.push_back(Weights());
    const auto vm = Lookup(ffi::Module::LoadFromFile(library.path), "vm_load_executable")();
    const auto vm_module = vm.cast<ffi::Module>();
    Lookup(vm_module, "vm_initialization")(int{kCpu.device_type}, kCpu.device_id, kPooledAllocator);
    main_ = Lookup(vm_module, "main");
  }

  void SetInput(size_t index, const char* values) {
    std::memcpy(buffers_[index].data(), values, inputs[index].Bytes());
  }

  // Runs one batch and returns its milliseconds.
  double Run() {
    const std::vector<ffi::AnyView> arguments(arguments_.begin(), arguments_.end());
    const auto start = std::chrono::steady_clock::now();
    main_.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &returned_);
    const auto end = std::chrono::steady_clock::now();
    return std::chrono::duration<double, std::milli>(end - start).count();
  }

  // The values of an output of the last run.
  std::string Output(size_t index) const {
    auto tensor = returned_.as<ffi::Tensor>();
    if (!tensor) tensor = returned_.cast<ffi::Array<ffi::Tensor>>()[static_cast<int64_t>(index)];
    return std::string(static_cast<const char*>(tensor->data_ptr()), outputs[index].Bytes());
  }

  // How many batches the values of an input are.
  size_t Batches(const std::string& values, size_t input) const {
    return values.size() / inputs[input].Bytes();
  }

  // Whether all inputs and outputs have the same first axis.
  bool IsBatched() const {
    std::vector<int64_t> firsts;
    for (const auto* signatures : {&inputs, &outputs}) {
      for (const Signature& is : *signatures) firsts.push_back(is.shape.empty() ? 0 : is.shape[0]);
    }
    return firsts[0] > 0 && std::count(firsts.begin(), firsts.end(), firsts[0]) ==
                                static_cast<std::ptrdiff_t>(firsts.size());
  }

  const Object manifest;
  const std::vector<Signature> inputs, outputs;

 private:
  // Tensors on the mapped file.
  ffi::Array<ffi::Tensor> Weights() const {
    ffi::Array<ffi::Tensor> tensors;
    for (const Object& entry : manifest["params"].cast<ffi::Array<Object>>()) {
      const Signature is(entry);
      const auto offset = static_cast<size_t>(entry["offset"].cast<int64_t>());
      if (offset % kAlignment != 0 || offset + is.Bytes() > weights_.size) {
        throw Failure(weights_.path + " has no place for a weight that the manifest names");
      }
      tensors.push_back(is.At(weights_.data + offset));
    }
    return tensors;
  }

  MappedFile weights_;
  std::vector<Buffer> buffers_;
  std::vector<ffi::Any> arguments_;
  ffi::Function main_;
  ffi::Any returned_;
};

struct Options {
  std::string bundle;
  std::vector<std::string> inputs, outputs;
  int64_t threads = 0, runs = 10;
};

int64_t ParseCount(const std::string& option, const std::string& text, int64_t least) {
  char* end;
  const int64_t count = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || count < least || count > INT32_MAX) {
    throw Failure(option + " wants at least " + std::to_string(least) + ", got " + text);
  }
  return count;
}

Options ParseOptions(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& option = arguments[i];
    if (option.compare(0, 1, "-") != 0 && options.bundle.empty()) {
      options.bundle = option;
      continue;
    }
    if (++i == arguments.size()) throw Failure(option + " has no value\n" + kUsage);
    if (option == "-i") {
      options.inputs.push_back(arguments[i]);
    } else if (option == "-o") {
      options.outputs.push_back(arguments[i]);
    } else if (option == "--threads") {
      options.threads = ParseCount(option, arguments[i], 1);
    } else if (option == "--runs") {
      options.runs = ParseCount(option, arguments[i], 0);
    } else {
      throw Failure("no option " + option + "\n" + kUsage);
    }
  }
  if (options.bundle.empty()) throw Failure(std::string("no bundle is named\n") + kUsage);
  return options;
}

void CheckCount(const char* option, size_t given, size_t wanted) {
  if (given != 0 && given != wanted) {
    throw Failure(std::string(option) + " is given " + std::to_string(given) +
                  " times and the network has " + std::to_string(wanted));
  }
}

// The values of the inputs, all of the same number of batches; zeros where there are no files.
std::vector<std::string> ReadInputs(const Network& network, const std::vector<std::string>& paths) {
  std::vector<std::string> values;
  for (size_t i = 0; i < network.inputs.size(); ++i) {
    const Signature& is = network.inputs[i];
    values.push_back(paths.empty() ? std::string(is.Bytes(), '\0') : ReadNpy(paths[i], is));
    if (network.Batches(values[i], i) != network.Batches(values[0], 0)) {
      throw Failure("the inputs have different numbers of batches");
    }
  }
  if (network.Batches(values[0], 0) > 1 && !network.IsBatched()) {
    throw Failure("the network has no axis for batches: give it the inputs of one run");
  }
  return values;
}

// TVM reads the environment when it starts its threads.
void SetThreads(int64_t threads) {
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);
  setenv("TVM_BIND_THREADS", "0", 0);  // bound, they would leave the cores that `taskset` gave
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kBigCores, threads);
}

void RunBundle(const Options& options) {
  Network network(options.bundle);
  CheckCount("-i", options.inputs.size(), network.inputs.size());
  CheckCount("-o", options.outputs.size(), network.outputs.size());
  const std::vector<std::string> inputs = ReadInputs(network, options.inputs);
  std::vector<std::string> outputs(network.outputs.size());
  const int64_t threads =
      options.threads ? options.threads : network.manifest["threads"].cast<int64_t>();
  SetThreads(threads);
  for (size_t batch = 0; batch < network.Batches(inputs[0], 0); ++batch) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      network.SetInput(i, inputs[i].data() + batch * network.inputs[i].Bytes());
    }
    network.Run();
    for (size_t i = 0; i < outputs.size(); ++i) outputs[i] += network.Output(i);
  }
  for (size_t i = 0; i < options.outputs.size(); ++i) {
    WriteNpy(options.outputs[i], network.outputs[i], outputs[i]);
  }
  std::vector<double> times;
  for (int64_t run = 0; run < options.runs; ++run) times.push_back(network.Run());
  if (times.empty()) return;
  std::sort(times.begin(), times.end());
  std::printf("median %.3f ms, fastest %.3f ms of %zu runs, %d thread(s)\n",
              times[times.size() / 2], times.front(), times.size(), static_cast<int>(threads));
}

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "--help") == 0) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    RunBundle(ParseOptions({arguments + 1, arguments + count}));
  } catch (const ffi::Error& error) {
    const std::string reason = error.message();
    std::fprintf(stderr, "error: the bundle is damaged, or can't run here: %s\n", reason.c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
