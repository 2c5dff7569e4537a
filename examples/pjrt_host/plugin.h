// The PJRT C API of a plug-in: errors are thrown, and what it makes is destroyed with its owner.

#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "xla/pjrt/c/pjrt_c_api.h"

namespace pjrt_host {

inline const PJRT_Api* api = nullptr;  // the plug-in's functions; set once, before any of them is called

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Every structure says the size that this header knows; the plug-in, older or newer, judges by it. A plug-in whose
// table ends before a function is too old.

#define ARGS(function, name) \
  function##_Args name{};    \
  name.struct_size = function##_Args_STRUCT_SIZE

#define CALL(function, args) \
  (Need(#function, offsetof(PJRT_Api, function) + sizeof(void*)), Check(#function, api->function(&(args))))

inline void Need(const char* function, size_t size) {
  if (api->struct_size < size) throw Failure(std::string("the plug-in is too old: it has no ") + function);
}

inline std::string Message(PJRT_Error* error) {
  ARGS(PJRT_Error_Message, said);
  said.error = error;
  api->PJRT_Error_Message(&said);
  std::string message(said.message, said.message_size);
  ARGS(PJRT_Error_Destroy, gone);
  gone.error = error;
  api->PJRT_Error_Destroy(&gone);
  return message;
}

inline void Check(const char* function, PJRT_Error* error) {
  if (error != nullptr) throw Failure(std::string(function) + ": " + Message(error));
}

// What the plug-in makes is destroyed with its owner.

#define OWNER(Type, field)                                                       \
  struct Destroy##Type {                                                         \
    void operator()(PJRT_##Type* it) const {                                     \
      ARGS(PJRT_##Type##_Destroy, args);                                         \
      args.field = it;                                                           \
      if (PJRT_Error* error = api->PJRT_##Type##_Destroy(&args)) Message(error); \
    }                                                                            \
  };                                                                             \
  using Type = std::unique_ptr<PJRT_##Type, Destroy##Type>

OWNER(Event, event);
OWNER(Client, client);
OWNER(Buffer, buffer);
OWNER(Executable, executable);
OWNER(LoadedExecutable, executable);
OWNER(TopologyDescription, topology);

inline void Await(PJRT_Event* made) {
  const Event event(made);
  ARGS(PJRT_Event_Await, args);
  args.event = event.get();
  CALL(PJRT_Event_Await, args);
}

inline void Load(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: plug-ins do not expect it
  if (library == nullptr) throw Failure(std::string("no plug-in: ") + dlerror());
  auto get = reinterpret_cast<const PJRT_Api* (*)()>(dlsym(library, "GetPjrtApi"));
  if (get == nullptr) throw Failure(path + ": no PJRT plug-in, it has no GetPjrtApi");
  api = get();
  const PJRT_Api_Version& its = api->pjrt_api_version;
  if (its.major_version != PJRT_API_MAJOR)
    throw Failure(path + ": PJRT " + std::to_string(its.major_version) + "." + std::to_string(its.minor_version) +
                  ", and this was built for " + std::to_string(PJRT_API_MAJOR) + ".x: build it with that header");
  ARGS(PJRT_Plugin_Initialize, args);
  CALL(PJRT_Plugin_Initialize, args);
}

inline Client MakeClient() {
  ARGS(PJRT_Client_Create, args);
  CALL(PJRT_Client_Create, args);
  return Client(args.client);
}

inline PJRT_Device* FirstDevice(PJRT_Client* client) {
  ARGS(PJRT_Client_AddressableDevices, args);
  args.client = client;
  CALL(PJRT_Client_AddressableDevices, args);
  if (args.num_addressable_devices == 0) throw Failure("the plug-in has no device here");
  return args.addressable_devices[0];
}

// The caller keeps the code; only "mlir" is spoken here.
inline PJRT_Program Mlir(const std::string& code) {
  PJRT_Program program{};
  program.struct_size = PJRT_Program_STRUCT_SIZE;
  program.code = const_cast<char*>(code.data());  // read only: the field is of both directions
  program.code_size = code.size();
  program.format = "mlir";
  program.format_size = 4;
  return program;
}

inline void CheckOutputs(PJRT_Executable* executable, size_t wanted) {
  ARGS(PJRT_Executable_NumOutputs, args);
  args.executable = executable;
  CALL(PJRT_Executable_NumOutputs, args);
  if (args.num_outputs != wanted)
    throw Failure("the program has " + std::to_string(args.num_outputs) + " outputs, wanted " + std::to_string(wanted));
}

inline LoadedExecutable Compile(PJRT_Client* client, const std::string& code, const std::string& options,
                                size_t outputs) {
  const PJRT_Program program = Mlir(code);
  ARGS(PJRT_Client_Compile, args);
  args.client = client;
  args.program = &program;
  args.compile_options = options.data();
  args.compile_options_size = options.size();
  CALL(PJRT_Client_Compile, args);
  LoadedExecutable loaded(args.executable);
  ARGS(PJRT_LoadedExecutable_GetExecutable, of);
  of.loaded_executable = loaded.get();
  CALL(PJRT_LoadedExecutable_GetExecutable, of);
  CheckOutputs(Executable(of.executable).get(), outputs);
  return loaded;
}

inline PJRT_NamedValue Named(const std::string& name, const std::string& value) {
  PJRT_NamedValue named{};
  named.struct_size = PJRT_NamedValue_STRUCT_SIZE;
  named.name = name.data();
  named.name_size = name.size();
  named.type = PJRT_NamedValue_kString;
  named.string_value = value.data();
  named.value_size = value.size();
  return named;
}

// For one GPU as XLA's GpuTargetConfigProto, a text, describes it; none need be there.
inline void CompileFor(const std::string& target_config, const std::string& code, const std::string& options,
                       size_t outputs) {
  const std::string names[] = {"topology", "target_config"}, one = "1x1x1";
  const PJRT_NamedValue values[] = {Named(names[0], one), Named(names[1], target_config)};
  ARGS(PJRT_TopologyDescription_Create, of);
  of.create_options = values;
  of.num_options = 2;
  CALL(PJRT_TopologyDescription_Create, of);
  const TopologyDescription topology(of.topology);
  const PJRT_Program program = Mlir(code);
  ARGS(PJRT_Compile, args);
  args.topology = topology.get();
  args.program = &program;
  args.compile_options = options.data();
  args.compile_options_size = options.size();
  CALL(PJRT_Compile, args);
  CheckOutputs(Executable(args.executable).get(), outputs);
}

struct Shape {
  PJRT_Buffer_Type type;
  std::vector<int64_t> dims;
  size_t bytes;
};

inline Buffer ToDevice(PJRT_Client* client, PJRT_Device* device, const Shape& shape, const std::string& bytes) {
  ARGS(PJRT_Client_BufferFromHostBuffer, args);
  args.client = client;
  args.data = bytes.data();
  args.type = shape.type;
  args.dims = shape.dims.data();
  args.num_dims = shape.dims.size();
  args.host_buffer_semantics = PJRT_HostBufferSemantics_kImmutableUntilTransferCompletes;
  args.device = device;
  CALL(PJRT_Client_BufferFromHostBuffer, args);
  Buffer buffer(args.buffer);
  Await(args.done_with_host_buffer);
  return buffer;
}

inline std::string ToHost(PJRT_Buffer* buffer, const Shape& shape) {
  std::vector<int64_t> last_first;  // the dimensions, the last one dense: as the file has it, whatever the device does
  for (size_t dim = shape.dims.size(); dim-- > 0;) last_first.push_back(static_cast<int64_t>(dim));
  PJRT_Buffer_MemoryLayout layout{};
  layout.struct_size = PJRT_Buffer_MemoryLayout_STRUCT_SIZE;
  layout.type = PJRT_Buffer_MemoryLayout_Type_Tiled;
  layout.tiled.struct_size = PJRT_Buffer_MemoryLayout_Tiled_STRUCT_SIZE;
  layout.tiled.minor_to_major = last_first.data();
  layout.tiled.minor_to_major_size = last_first.size();
  std::string bytes(shape.bytes, '\0');
  ARGS(PJRT_Buffer_ToHostBuffer, args);
  args.src = buffer;
  args.host_layout = &layout;
  args.dst = bytes.data();
  args.dst_size = bytes.size();
  CALL(PJRT_Buffer_ToHostBuffer, args);
  Await(args.event);
  return bytes;
}

inline std::vector<Buffer> Execute(PJRT_LoadedExecutable* executable, const std::vector<Buffer>& inputs,
                                   size_t num_outputs) {
  std::vector<PJRT_Buffer*> given, made(num_outputs);
  for (const Buffer& input : inputs) given.push_back(input.get());
  PJRT_Buffer* const* argument_list = given.data();
  PJRT_Buffer** output_list = made.data();
  PJRT_Event* done = nullptr;
  PJRT_ExecuteOptions options{};
  options.struct_size = PJRT_ExecuteOptions_STRUCT_SIZE;
  ARGS(PJRT_LoadedExecutable_Execute, args);
  args.executable = executable;
  args.options = &options;
  args.argument_lists = &argument_list;
  args.num_devices = 1;
  args.num_args = given.size();
  args.output_lists = &output_list;
  args.device_complete_events = &done;
  CALL(PJRT_LoadedExecutable_Execute, args);
  std::vector<Buffer> outputs;
  for (PJRT_Buffer* output : made) outputs.emplace_back(output);
  Await(done);
  return outputs;
}

}  // namespace pjrt_host
