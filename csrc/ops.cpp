// Defines every operator of cnnrnn_ext with torch's dispatcher. The schemas, with shapes in comments,
// stand in cnnrnn_ext/operators.schema: the Python side reads the same file where nothing is compiled.

#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>

static const char kSchemas[] =
#include "../cnnrnn_ext/operators.schema"
    ;

STABLE_TORCH_LIBRARY(cnnrnn_ext, library) {
  std::istringstream lines(kSchemas);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line[0] != '#') library.def(line.c_str());
  }
}
