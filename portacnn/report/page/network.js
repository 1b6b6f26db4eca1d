// The forward pass of a network whose layers run one after the other. Values are Float32Arrays in the
// order (C, H, W); sums are in double precision.
const portacnn = (() => {
  const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  const layers = {
    relu: (x) => x.map((v) => (v > 0 || v !== v ? v : 0)),

    flatten: (x) => x,

    linear(x, layer, weights) {
      const y = new Float32Array(layer.out[0]);
      for (let o = 0, at = layer.weight; o < y.length; o++) {
        let sum = weights[layer.bias + o];
        for (let i = 0; i < x.length; i++) sum += x[i] * weights[at++];
        y[o] = sum;
      }
      return y;
    },

    // Batch norm outside training: a factor and a term for each channel.
    norm(x, layer, weights) {
      const cells = x.length / layer.out[0];
      return x.map((v, i) => {
        const c = Math.floor(i / cells);
        return v * weights[layer.factor + c] + weights[layer.term + c];
      });
    },

    global(x, layer) {
      const channels = layer.in[0];
      const cells = x.length / channels;
      return Float32Array.from({ length: channels }, (_, c) => {
        const own = x.subarray(c * cells, (c + 1) * cells);
        return layer.mean ? own.reduce((a, b) => a + b, 0) / cells : own.reduce((a, b) => Math.max(a, b));
      });
    },

    conv(x, layer, weights) {
      const [O, OH, OW] = layer.out;
      const inputs = layer.in[0] / layer.groups;
      const taps = layer.kernel[0] * layer.kernel[1];
      const y = new Float32Array(O * OH * OW);
      for (let o = 0; o < O; o++) {
        const sums = new Float64Array(OH * OW).fill(weights[layer.bias + o]);
        const group = Math.floor(o / (O / layer.groups));
        for (let c = 0; c < inputs; c++) {
          const at = layer.weight + (o * inputs + c) * taps;
          each(layer, group * inputs + c, (to, from, tap) => { sums[to] += x[from] * weights[at + tap]; });
        }
        y.set(sums, o * OH * OW);
      }
      return y;
    },

    max: (x, layer) => pooled(layer, -Infinity, (y, v) => (v > y || v !== v ? v : y), x),

    mean(x, layer) {
      const taps = layer.kernel[0] * layer.kernel[1];
      return pooled(layer, 0, (y, v) => y + v, x).map((v) => v / taps);
    },
  };

  function pooled(layer, start, join, x) {
    const [C, OH, OW] = layer.out;
    const y = new Float64Array(C * OH * OW).fill(start);
    for (let c = 0; c < C; c++) {
      each(layer, c, (to, from) => { y[c * OH * OW + to] = join(y[c * OH * OW + to], x[from]); });
    }
    return Float32Array.from(y);
  }

  // Calls f(output cell, input cell, tap) for every input cell of a channel that a window reads.
  function each(layer, channel, f) {
    const [, H, W] = layer.in;
    const [, OH, OW] = layer.out;
    const [KH, KW] = layer.kernel;
    for (let k = 0; k < KH * KW; k++) {
      const down = Math.floor(k / KW) * layer.dilation[0] - layer.pad[0];
      const right = (k % KW) * layer.dilation[1] - layer.pad[1];
      for (let oy = 0; oy < OH; oy++) {
        const iy = oy * layer.stride[0] + down;
        if (iy < 0 || iy >= H) continue;
        for (let ox = 0; ox < OW; ox++) {
          const ix = ox * layer.stride[1] + right;
          if (ix >= 0 && ix < W) f(oy * OW + ox, (channel * H + iy) * W + ix, k);
        }
      }
    }
  }

  const network = JSON.parse(document.getElementById("data").textContent);
  if (!network) return null;
  const weights = new Float32Array(bytesOf(network.weights).buffer);

  // The outputs of all layers for pixels 0..255 (H*W): [{layer, y}], the logits last.
  function forward(pixels) {
    let x = Float32Array.from(pixels, (p) => p * network.scale + network.shift);
    return network.layers.map((layer) => {
      x = layers[layer.kind](x, layer, weights);
      return { layer, y: x };
    });
  }

  function softmax(logits) {
    const most = Math.max(...logits);
    const powers = Array.from(logits, (v) => Math.exp(v - most));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((v) => v / sum);
  }

  const examples = network.examples.map((e) => {
    const bytes = bytesOf(e.pixels);
    return { label: e.label, pixels: e.kind === "u" ? bytes : new Float32Array(bytes.buffer) };
  });
  return { network, examples, forward, softmax };
})();
