// A PJRT plug-in that computes nothing: it writes down what a host hands over, and gives back what it finds in files.
//
// In the folder that the environment variable STAND_IN names it writes program, options, arguments.txt (a line each:
// type, dims), argumentN (the bytes), and left (how many of its objects nobody destroyed when the client goes). The
// results are its files output0, output1, ...; without output0 there is no device.

#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "xla/pjrt/c/pjrt_c_api.h"

namespace {

struct Object {  // behind every pointer that a host is given
  Object() { ++living; }
  ~Object() { --living; }
  std::string bytes, line;
  static inline int living = 0;
};

std::string Path(const std::string& name) { return std::string(std::getenv("STAND_IN")) + "/" + name; }

void Write(const std::string& name, const std::string& bytes) { std::ofstream(Path(name), std::ios::binary) << bytes; }

bool Read(const std::string& name, std::string* bytes) {
  std::ifstream file(Path(name), std::ios::binary);
  bytes->assign(std::istreambuf_iterator<char>(file), {});
  return static_cast<bool>(file);
}

size_t CountOutputs() {
  size_t count = 0;
  for (std::string bytes; Read("output" + std::to_string(count), &bytes);) ++count;
  return count;
}

template <typename T>
T* New(const std::string& bytes = "") {
  auto* object = new Object;
  object->bytes = bytes;
  return reinterpret_cast<T*>(object);
}

Object* Of(const void* pointer) { return static_cast<Object*>(const_cast<void*>(pointer)); }

PJRT_Error* Wrong(const std::string& message) { return New<PJRT_Error>(message); }

// A structure of another size than the header's is refused, as plug-ins do.
#define ANSWER(function)                                \
  api.function = [](function##_Args* args) -> PJRT_Error* { \
    if (args->struct_size != function##_Args_STRUCT_SIZE) return Wrong(#function ": wrong\nsize");

#define DESTROY(Type, field) ANSWER(PJRT_##Type##_Destroy) delete Of(args->field); return nullptr; }

PJRT_Api Table() {
  PJRT_Api api{};
  api.struct_size = PJRT_Api_STRUCT_SIZE;
  if (std::getenv("STAND_IN_OLD")) api.struct_size = offsetof(PJRT_Api, PJRT_LoadedExecutable_Execute);
  api.pjrt_api_version.major_version = PJRT_API_MAJOR + (std::getenv("STAND_IN_NEW") != nullptr);
  api.PJRT_Error_Destroy = [](PJRT_Error_Destroy_Args* args) { delete Of(args->error); };
  api.PJRT_Error_Message = [](PJRT_Error_Message_Args* args) {
    args->message = Of(args->error)->bytes.data();
    args->message_size = Of(args->error)->bytes.size();
  };
  ANSWER(PJRT_Plugin_Initialize) return nullptr; };
  ANSWER(PJRT_Event_Await) return nullptr; };
  DESTROY(Event, event);
  DESTROY(Buffer, buffer);
  DESTROY(Executable, executable);
  DESTROY(LoadedExecutable, executable);
  ANSWER(PJRT_Client_Create)
    if (CountOutputs() == 0) return Wrong("no device:\nno output0");
    args->client = New<PJRT_Client>();
    return nullptr;
  };
  ANSWER(PJRT_Client_Destroy)
    delete Of(args->client);
    Write("left", std::to_string(Object::living));
    return nullptr;
  };
  ANSWER(PJRT_Client_AddressableDevices)
    static PJRT_Device* const device = reinterpret_cast<PJRT_Device*>(&Object::living);
    args->addressable_devices = &device;
    args->num_addressable_devices = 1;
    return nullptr;
  };
  ANSWER(PJRT_Client_Compile)
    if (std::string(args->program->format, args->program->format_size) != "mlir") return Wrong("no mlir");
    Write("program", {args->program->code, args->program->code_size});
    Write("options", {args->compile_options, args->compile_options_size});
    args->executable = New<PJRT_LoadedExecutable>();
    return nullptr;
  };
  ANSWER(PJRT_LoadedExecutable_GetExecutable)
    args->executable = New<PJRT_Executable>();
    return nullptr;
  };
  ANSWER(PJRT_Executable_NumOutputs)
    args->num_outputs = CountOutputs();
    return nullptr;
  };
  ANSWER(PJRT_Client_BufferFromHostBuffer)
    args->buffer = New<PJRT_Buffer>();
    args->done_with_host_buffer = New<PJRT_Event>();
    Object* buffer = Of(args->buffer);
    size_t size = args->type == PJRT_Buffer_Type_PRED ? 1 : args->type == PJRT_Buffer_Type_BF16 ? 2 : 4;
    buffer->line = std::to_string(args->type);
    for (size_t i = 0; i < args->num_dims; size *= args->dims[i++]) buffer->line += " " + std::to_string(args->dims[i]);
    buffer->bytes.assign(static_cast<const char*>(args->data), size);
    return nullptr;
  };
  ANSWER(PJRT_LoadedExecutable_Execute)
    if (args->options->struct_size != PJRT_ExecuteOptions_STRUCT_SIZE) return Wrong("wrong options");
    std::string lines, bytes;
    for (size_t i = 0; i < args->num_args; ++i) {
      Write("argument" + std::to_string(i), Of(args->argument_lists[0][i])->bytes);
      lines += Of(args->argument_lists[0][i])->line + "\n";
    }
    Write("arguments.txt", lines);
    for (size_t i = 0; Read("output" + std::to_string(i), &bytes); ++i)
      args->output_lists[0][i] = New<PJRT_Buffer>(bytes);
    args->device_complete_events[0] = New<PJRT_Event>();
    return nullptr;
  };
  ANSWER(PJRT_Buffer_ToHostBuffer)
    const std::string& bytes = Of(args->src)->bytes;
    if (args->dst_size < bytes.size()) return Wrong("too small");
    bytes.copy(static_cast<char*>(args->dst), bytes.size());
    args->event = New<PJRT_Event>();
    return nullptr;
  };
  return api;
}

}  // namespace

extern "C" const PJRT_Api* GetPjrtApi() {
  static const PJRT_Api api = Table();
  return &api;
}
