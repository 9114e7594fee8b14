// The classes of a picture in the browser, with onnxruntime-web and a file of export_onnx.
// `about` is {classes, preprocessing} of the file's metadata, which onnxruntime-web does not show.

// The shorter side to image_size / eval_crop, the central square, mean and deviation:
// RGBA bytes -> float32 of the shape (1, size, size, 3).
export function prepare(rgba, width, height, { image_size: size, eval_crop: crop, mean, std }) {
  const short = Math.floor(size / crop);
  const newWidth = Math.floor((short * width) / Math.min(width, height));
  const newHeight = Math.floor((short * height) / Math.min(width, height));
  const pixels = resize(rgba, width, height, newWidth, newHeight);
  const left = halfEven(newWidth - size);
  const top = halfEven(newHeight - size);
  const input = new Float32Array(size * size * 3);
  for (let y = 0, i = 0; y < size; y++)
    for (let x = 0; x < size; x++)
      for (let c = 0; c < 3; c++, i++) {
        const value = pixels[4 * ((top + y) * newWidth + left + x) + c];
        input[i] = (value / 255 - mean[c]) / std[c];
      }
  return input;
}

// The most probable classes as [name, probability], best first.
export async function classify(ort, session, input, { classes, preprocessing }, count = 5) {
  const size = preprocessing.image_size;
  const images = new ort.Tensor("float32", input, [1, size, size, 3]);
  const logits = Array.from((await session.run({ images })).logits.data);
  const greatest = Math.max(...logits);
  const values = logits.map((x) => Math.exp(x - greatest));
  const sum = values.reduce((a, b) => a + b);
  return values
    .map((value, i) => [classes[i], value / sum])
    .sort((a, b) => b[1] - a[1])
    .slice(0, count);
}

// n / 2, halves to the even neighbour, as Python rounds.
const halfEven = (n) => (n % 2 ? 2 * Math.round(n / 4) : n / 2);

// Pillow's bicubic filter: a canvas has another one.
function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
}

function resize(rgba, width, height, newWidth, newHeight) {
  const rows = resample(rgba, newWidth, height, width, 4, 4 * width, newWidth);
  return resample(rows, newHeight, newWidth, height, 4 * newWidth, 4, newWidth);

  // Along one axis: `outputs` from `inputs` pixels `step` apart, for each of `lines` `stride` apart.
  function resample(source, outputs, lines, inputs, step, stride, rowLength) {
    const result = new Uint8ClampedArray(4 * outputs * lines);
    const scale = inputs / outputs;
    const wide = Math.max(scale, 1);
    for (let o = 0; o < outputs; o++) {
      const centre = (o + 0.5) * scale;
      const first = Math.max(0, Math.floor(centre - 2 * wide + 0.5));
      const last = Math.min(inputs, Math.floor(centre + 2 * wide + 0.5));
      const weights = [];
      for (let i = first; i < last; i++) weights.push(bicubic((i - centre + 0.5) / wide));
      const total = weights.reduce((a, b) => a + b);
      for (let line = 0; line < lines; line++)
        for (let c = 0; c < 3; c++) {
          let sum = 0;
          weights.forEach((w, k) => (sum += w * source[line * stride + (first + k) * step + c]));
          const place = step === 4 ? line * rowLength + o : o * rowLength + line;
          result[4 * place + c] = sum / total;
        }
    }
    return result;
  }
}
