// The most probable classes of a picture, with onnxruntime and a file of export_onnx.
//
//   g++ -std=c++17 -O2 classify.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -o classify
//   ./classify model.onnx picture.ppm 224 0.875      (image_size and eval_crop of its metadata)
//
// A picture is a binary PPM (P6), which `convert` of ImageMagick or Pillow write.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
  int width, height;
  std::vector<unsigned char> rgb;
};

Picture read_ppm(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int width = 0, height = 0, greatest = 0;
  file >> magic >> width >> height >> greatest;
  file.get();  // the white space after the header
  if (magic != "P6" || greatest != 255 || width < 1 || height < 1)
    throw std::runtime_error(std::string(path) + " is no binary PPM with 8 bits");
  Picture picture{width, height, std::vector<unsigned char>(size_t(3) * width * height)};
  if (!file.read(reinterpret_cast<char*>(picture.rgb.data()), picture.rgb.size()))
    throw std::runtime_error(std::string(path) + " is cut off");
  return picture;
}

// Pillow's bicubic filter along the width; the result is transposed, so that two calls resize both
// axes and turn it back.
Picture resample(const Picture& source, int outputs) {
  auto bicubic = [](double x) {
    x = std::abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0.0;
  };
  Picture turned{source.height, outputs,
                 std::vector<unsigned char>(size_t(3) * outputs * source.height)};
  const double scale = double(source.width) / outputs, wide = std::max(scale, 1.0);
  for (int o = 0; o < outputs; o++) {
    const double centre = (o + 0.5) * scale;
    const int first = std::max(0, int(std::floor(centre - 2 * wide + 0.5)));
    const int last = std::min(source.width, int(std::floor(centre + 2 * wide + 0.5)));
    std::vector<double> weights;
    for (int i = first; i < last; i++) weights.push_back(bicubic((i - centre + 0.5) / wide));
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (int y = 0; y < source.height; y++)
      for (int c = 0; c < 3; c++) {
        double sum = 0;
        for (int i = first; i < last; i++)
          sum += weights[i - first] * source.rgb[3 * (size_t(y) * source.width + i) + c];
        const double value = std::clamp(std::round(sum / total), 0.0, 255.0);
        turned.rgb[3 * (size_t(o) * source.height + y) + c] = static_cast<unsigned char>(value);
      }
  }
  return turned;
}

int main(int count, char** arguments) try {
  if (count != 5) throw std::runtime_error("usage: classify MODEL PICTURE IMAGE_SIZE EVAL_CROP");
  const int size = std::atoi(arguments[3]);
  const int shorter = int(std::floor(size / std::atof(arguments[4])));
  const std::array<float, 3> mean{0.485f, 0.456f, 0.406f}, deviation{0.229f, 0.224f, 0.225f};

  // The shorter side to image_size / eval_crop, the central square, mean and deviation.
  Picture picture = read_ppm(arguments[2]);
  const int least = std::min(picture.width, picture.height);
  const int width = int(int64_t(shorter) * picture.width / least);
  const int height = int(int64_t(shorter) * picture.height / least);
  picture = resample(resample(picture, width), height);
  const int left = int(std::nearbyint((width - size) / 2.0));
  const int top = int(std::nearbyint((height - size) / 2.0));
  std::vector<float> input;  // (1, size, size, 3)
  for (int y = top; y < top + size; y++)
    for (int x = left; x < left + size; x++)
      for (int c = 0; c < 3; c++)
        input.push_back((picture.rgb[3 * (size_t(y) * width + x) + c] / 255.0f - mean[c]) /
                        deviation[c]);

  Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::Session session(environment, arguments[1], Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  auto classes = session.GetModelMetadata().LookupCustomMetadataMapAllocated("classes", allocator);
  std::printf("classes: %.200s\n", classes ? classes.get() : "unknown");

  const std::array<int64_t, 4> shape{1, size, size, 3};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto images = Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), shape.data(),
                                                shape.size());
  const char *inputs[] = {"images"}, *outputs[] = {"logits"};
  auto results = session.Run(Ort::RunOptions{}, inputs, &images, 1, outputs, 1);
  const float* logits = results[0].GetTensorData<float>();
  const size_t labels = results[0].GetTensorTypeAndShapeInfo().GetElementCount();

  const float greatest = *std::max_element(logits, logits + labels);
  std::vector<double> probabilities;
  for (size_t i = 0; i < labels; i++) probabilities.push_back(std::exp(logits[i] - greatest));
  const double sum = std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
  std::vector<size_t> order(labels);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return probabilities[a] > probabilities[b]; });
  for (size_t i = 0; i < std::min<size_t>(5, labels); i++)
    std::printf("%zu %.6f\n", order[i], probabilities[order[i]] / sum);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
