// Runs what `dito export` wrote through the PJRT C API of a plug-in, with neither Python nor JAX:
//
//   pjrt_host PLUGIN.so DIR [PLATFORM [TOLERANCE]]              on the plug-in's first device, against recorded results
//   pjrt_host --compile TARGET_CONFIG PLUGIN.so DIR [PLATFORM]  for a GPU that need not be there
//
// PLATFORM is "cuda" where none is given. Exit status: 0 the results are those recorded, 1 they are not, 2 it could not
// run; one line says why. dito_jax/interop/host.py says what the files in DIR/host hold.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "plugin.h"

namespace pjrt_host {
namespace {

constexpr double kTolerance = 0.01;  // of an output's largest number: a GPU multiplies float32 as TF32

// ---- numbers

template <typename T>
double Number(const char* from) {
  T number;
  std::memcpy(&number, from, sizeof(T));
  return static_cast<double>(number);
}

double Bfloat16(const char* from) {
  char bytes[4] = {0, 0, from[0], from[1]};
  return Number<float>(bytes);
}

struct Dtype {
  const char* name;
  PJRT_Buffer_Type type;
  size_t size;
  bool exact;
  double (*number)(const char*);
};

constexpr Dtype kDtypes[] = {
    {"float32", PJRT_Buffer_Type_F32, 4, false, Number<float>},
    {"bfloat16", PJRT_Buffer_Type_BF16, 2, false, Bfloat16},
    {"float64", PJRT_Buffer_Type_F64, 8, false, Number<double>},
    {"int32", PJRT_Buffer_Type_S32, 4, true, Number<int32_t>},
    {"uint32", PJRT_Buffer_Type_U32, 4, true, Number<uint32_t>},
    {"int8", PJRT_Buffer_Type_S8, 1, true, Number<int8_t>},
    {"uint8", PJRT_Buffer_Type_U8, 1, true, Number<uint8_t>},
    {"bool", PJRT_Buffer_Type_PRED, 1, true, Number<uint8_t>},
};

// ---- files

// One line of arguments.txt.
struct Array : Shape {
  std::string file;
  uint64_t offset;
  const Dtype* dtype;
};

std::string Read(const std::string& path, const char* cure = "`dito export RUN --platform cpu,cuda -o DIR` writes it") {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure(path + ": not there; " + cure);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Read(const std::string& directory, const Array& array) {
  std::ifstream file(directory + "/" + array.file, std::ios::binary | std::ios::ate);
  const auto size = file ? static_cast<uint64_t>(file.tellg()) : 0;
  std::string bytes(array.offset <= size && array.bytes <= size - array.offset ? array.bytes : 0, '\0');
  file.seekg(static_cast<std::streamoff>(array.offset));
  if (bytes.size() != array.bytes || !file.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
    throw Failure(directory + "/" + array.file + ": shorter than host/arguments.txt says; export the run again");
  return bytes;
}

void ReadArguments(const std::string& directory, std::vector<Array>* inputs, std::vector<Array>* outputs) {
  std::istringstream text(Read(directory + "/host/arguments.txt"));
  for (std::string line; std::getline(text, line);) {
    std::istringstream fields(line);
    std::string kind, dtype;
    Array array{};
    fields >> kind >> array.file >> array.offset >> array.bytes >> dtype;
    size_t wanted = 0;
    for (const Dtype& known : kDtypes)
      if (known.name == dtype) array.dtype = &known, array.type = known.type, wanted = known.size;
    for (int64_t dim; fields >> dim; wanted *= static_cast<size_t>(dim)) array.dims.push_back(dim);
    if (array.dtype == nullptr || wanted != array.bytes || (kind != "input" && kind != "output"))
      throw Failure(directory + "/host/arguments.txt: not understood: " + line);
    (kind == "input" ? inputs : outputs)->push_back(array);
  }
}

// ---- the two commands

// How far an output is off, and how far it may be.
struct Difference {
  Difference(const Dtype& dtype, const std::string& wanted, const std::string& found, double tolerance) {
    double largest = 0;
    for (size_t at = 0; at < wanted.size(); at += dtype.size) {
      const double number = dtype.number(&wanted[at]), its = dtype.number(&found[at]);
      const bool same = its == number || (std::isnan(its) && std::isnan(number));
      const double off = same ? 0 : std::fabs(its - number);
      furthest = std::isnan(off) ? INFINITY : std::max(furthest, off);  // a NaN is right only for a NaN
      if (std::isfinite(number)) largest = std::max(largest, std::fabs(number));
    }
    if (!dtype.exact) allowed = tolerance * largest;
  }

  double furthest = 0, allowed = 0;
};

int Run(const std::string& directory, const std::string& platform, double tolerance) {
  std::vector<Array> inputs, outputs;
  ReadArguments(directory, &inputs, &outputs);
  const std::string code = Read(directory + "/host/" + platform + ".mlirbc");
  const std::string options = Read(directory + "/host/options.pb");
  const Client client = MakeClient();
  PJRT_Device* device = FirstDevice(client.get());
  const LoadedExecutable executable = Compile(client.get(), code, options, outputs.size());
  std::vector<Buffer> given;
  for (const Array& input : inputs) given.push_back(ToDevice(client.get(), device, input, Read(directory, input)));
  const std::vector<Buffer> made = Execute(executable.get(), given, outputs.size());

  int wrong = 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Difference it(*outputs[i].dtype, Read(directory, outputs[i]), ToHost(made[i].get(), outputs[i]), tolerance);
    wrong += it.furthest > it.allowed;
    std::printf("output %zu: max abs difference %.3g, tolerance %.3g%s\n", i, it.furthest, it.allowed,
                it.furthest > it.allowed ? ": WRONG" : "");
  }
  std::printf("%s: arguments %zu, outputs %zu, wrong %d\n", directory.c_str(), inputs.size(), outputs.size(), wrong);
  return wrong == 0 ? 0 : 1;
}

int CompileOnly(const std::string& target_config, const std::string& directory, const std::string& platform) {
  std::vector<Array> inputs, outputs;
  ReadArguments(directory, &inputs, &outputs);
  const std::string code = Read(directory + "/host/" + platform + ".mlirbc");
  const std::string options = Read(directory + "/host/options.pb");
  CompileFor(Read(target_config, "README.md says what it is"), code, options, outputs.size());
  std::printf("%s: compiled, arguments %zu, outputs %zu\n", directory.c_str(), inputs.size(), outputs.size());
  return 0;
}

int Main(std::vector<std::string> words) {
  const bool compile_only = words.size() > 1 && words[0] == "--compile";
  const std::string target_config = compile_only ? words[1] : "";
  if (compile_only) words.erase(words.begin(), words.begin() + 2);
  if (words.size() < 2 || words.size() > (compile_only ? 3 : 4))
    throw Failure("usage: pjrt_host [--compile TARGET_CONFIG] PLUGIN.so DIR [PLATFORM [TOLERANCE]]");
  const std::string platform = words.size() > 2 ? words[2] : "cuda";
  Load(words[0]);
  if (compile_only) return CompileOnly(target_config, words[1], platform);
  char* end = nullptr;
  const double tolerance = words.size() > 3 ? std::strtod(words[3].c_str(), &end) : kTolerance;
  if (end != nullptr && (*end != '\0' || !(tolerance >= 0))) throw Failure(words[3] + ": no tolerance, wanted 0.01");
  return Run(words[1], platform, tolerance);
}

}  // namespace
}  // namespace pjrt_host

int main(int count, char** words) {
  setenv("TF_CPP_MIN_LOG_LEVEL", "3", 0);  // XLA's own log, unless it is asked for
  try {
    return pjrt_host::Main({words + 1, words + count});
  } catch (const pjrt_host::Failure& failure) {
    std::string line = failure.what();
    std::replace(line.begin(), line.end(), '\n', ' ');
    std::fprintf(stderr, "pjrt_host: %s\n", line.c_str());
    return 2;
  }
}
