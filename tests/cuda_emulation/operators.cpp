// The emulated operators' schemas: those of cnnrnn_ext, in a namespace of their own.

#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

static const char kSchemas[] =
#include "../../cnnrnn_ext/operators.schema"
    ;

STABLE_TORCH_LIBRARY(cnnrnn_emulated, library) {
  std::istringstream lines(kSchemas);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line[0] != '#') library.def(line.c_str());
  }
}
