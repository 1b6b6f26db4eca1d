// The drawing pad: strokes to an image of the network's size, its probabilities and feature maps.
if (portacnn) (() => {
  const { network, examples } = portacnn;
  const [, H, W] = network.input;
  const pad = document.getElementById("drawing");
  const answer = document.getElementById("answer");
  const centre = document.getElementById("centre");
  const SCALE = 10;
  const MOST_BARS = 20, MOST_MAPS = 16;
  pad.width = W * SCALE;
  pad.height = H * SCALE;
  pad.style.aspectRatio = `${W} / ${H}`;
  const ground = network.light ? "#fff" : "#000";
  const ink = network.light ? "#000" : "#fff";
  const pen = pad.getContext("2d", { willReadFrequently: true });
  let last = null, drawn = false, waiting = false;

  function clear() {
    pen.fillStyle = ground;
    pen.fillRect(0, 0, pad.width, pad.height);
    drawn = false;
  }

  function place(event) {
    const box = pad.getBoundingClientRect();
    const inner = { x: event.clientX - box.left - pad.clientLeft, y: event.clientY - box.top - pad.clientTop };
    return [inner.x * pad.width / pad.clientWidth, inner.y * pad.height / pad.clientHeight];
  }

  function stroke(from, to) {
    pen.strokeStyle = ink;
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = 0.075 * Math.min(pad.width, pad.height);
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(...to);
    pen.stroke();
    drawn = true;
    if (!waiting) {
      waiting = true;
      requestAnimationFrame(() => { waiting = false; if (drawn) classify(pixelsOfPad()); });
    }
  }

  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
    event.preventDefault();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = place(event);
    stroke(last, next);
    last = next;
  });
  for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => { last = null; });
  document.getElementById("clear").addEventListener("click", () => { clear(); forget(); });
  centre.addEventListener("change", () => { if (drawn) classify(pixelsOfPad()); });

  // How much ink each pixel of the pad has, 0..1.
  function inkOfPad() {
    const data = pen.getImageData(0, 0, pad.width, pad.height).data;
    const found = new Float32Array(pad.width * pad.height);
    for (let i = 0; i < found.length; i++) {
      found[i] = network.light ? 1 - data[4 * i] / 255 : data[4 * i] / 255;
    }
    return found;
  }

  // The mean ink of a rectangle of the pad for each pixel of the image.
  function sampled(full, left, top, step) {
    const cells = new Float32Array(H * W);
    for (let y = 0; y < H; y++) for (let x = 0; x < W; x++) {
      const y0 = Math.round(top + y * step), y1 = Math.max(Math.round(top + (y + 1) * step), y0 + 1);
      const x0 = Math.round(left + x * step), x1 = Math.max(Math.round(left + (x + 1) * step), x0 + 1);
      let sum = 0;
      for (let v = Math.max(y0, 0); v < Math.min(y1, pad.height); v++) {
        for (let u = Math.max(x0, 0); u < Math.min(x1, pad.width); u++) sum += full[v * pad.width + u];
      }
      cells[y * W + x] = sum / ((y1 - y0) * (x1 - x0));
    }
    return cells;
  }

  // The pixels 0..255 of the drawing. Centred as MNIST's digits are: the longer side takes 20 of 28
  // pixels, the centre of mass lies in the middle.
  function pixelsOfPad() {
    const full = inkOfPad();
    let cells;
    if (centre.checked) {
      let left = pad.width, right = -1, top = pad.height, bottom = -1, mass = 0, mx = 0, my = 0;
      for (let y = 0, i = 0; y < pad.height; y++) for (let x = 0; x < pad.width; x++, i++) {
        if (full[i] < 0.1) continue;
        left = Math.min(left, x); right = Math.max(right, x);
        top = Math.min(top, y); bottom = Math.max(bottom, y);
        mass += full[i]; mx += full[i] * x; my += full[i] * y;
      }
      const step = Math.max(right - left + 1, bottom - top + 1) / (20 / 28 * Math.min(H, W));
      cells = sampled(full, mx / mass + 0.5 - step * W / 2, my / mass + 0.5 - step * H / 2, step);
    } else {
      cells = sampled(full, 0, 0, SCALE);
    }
    return cells.map((v) => 255 * (network.light ? 1 - v : v));
  }

  // --- what the network says -----------------------------------------------------------------

  const bars = document.querySelector("#bars tbody");
  function forget() {
    answer.textContent = "Nothing is drawn yet.";
    bars.replaceChildren();
    document.getElementById("maps").replaceChildren();
  }

  function element(name, text, parent) {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }

  function classify(pixels) {
    const outputs = portacnn.forward(pixels);
    const shares = portacnn.softmax(outputs[outputs.length - 1].y);
    const order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a]);
    const best = order[0];
    answer.textContent = `It is ${network.names[best]}: ${(100 * shares[best]).toFixed(1)}%`;
    const chosen = shares.length > MOST_BARS ? order.slice(0, MOST_BARS) : shares.map((_, i) => i);
    bars.replaceChildren();
    for (const index of chosen) {
      const row = element("tr", null, bars);
      const head = element("th", network.names[index], row);
      head.scope = "row";
      head.title = network.names[index];
      element("i", null, element("td", null, row)).style.setProperty("--share", `${100 * shares[index]}%`);
      element("td", `${(100 * shares[index]).toFixed(1)}%`, row).className = "number";
    }
    maps(outputs);
    portacnn.last = { pixels: Array.from(pixels), shares, best };
  }

  function maps(outputs) {
    const parent = document.getElementById("maps");
    parent.replaceChildren();
    for (const { layer, y } of outputs) {
      if (layer.out.length !== 3 || layer.out[1] * layer.out[2] === 1) continue;
      const [C, h, w] = layer.out;
      const count = Math.min(C, MOST_MAPS), columns = Math.min(8, count);
      const figure = element("figure", null, parent);
      const some = count < C ? `the first ${count} of ${C}` : `${C}`;
      const said = `${layer.path}: ${some} maps of ${h}x${w}`;
      const canvas = element("canvas", null, figure);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `Feature maps of ${said}`);
      canvas.width = columns * (w + 1) - 1;
      canvas.height = Math.ceil(count / columns) * (h + 1) - 1;
      const shown = y.subarray(0, count * h * w);
      const low = shown.reduce((a, b) => Math.min(a, b)), high = shown.reduce((a, b) => Math.max(a, b));
      const brush = canvas.getContext("2d");
      for (let c = 0; c < count; c++) {
        const cells = shown.subarray(c * h * w, (c + 1) * h * w);
        brush.putImageData(image(cells, h, w, low, high), (c % columns) * (w + 1), Math.floor(c / columns) * (h + 1));
      }
      element("figcaption", said, figure);
    }
  }

  // Values as an image in the colours of cividis.
  const COLORS = [[0, 32, 76], [58, 77, 110], [124, 123, 120], [188, 175, 111], [255, 234, 70]];
  function image(values, h, w, low, high) {
    const made = new ImageData(w, h);
    values.forEach((v, i) => {
      const at = high > low ? 4 * (v - low) / (high - low) : 0;
      const k = Math.min(3, Math.floor(at));
      for (let c = 0; c < 3; c++) {
        made.data[4 * i + c] = COLORS[k][c] + (at - k) * (COLORS[k + 1][c] - COLORS[k][c]);
      }
      made.data[4 * i + 3] = 255;
    });
    return made;
  }

  // --- test images -----------------------------------------------------------------------------

  examples.forEach((example, number) => {
    const button = element("button", null, document.getElementById("examples"));
    button.type = "button";
    button.setAttribute("aria-label", `Test image ${number}, class ${network.names[example.label]}`);
    const small = element("canvas", null, button);
    small.width = W;
    small.height = H;
    const made = new ImageData(W, H);
    example.pixels.forEach((p, i) => made.data.set([p, p, p, 255], 4 * i));
    small.getContext("2d").putImageData(made, 0, 0);
    button.addEventListener("click", () => {
      clear();
      pen.imageSmoothingEnabled = false;
      pen.drawImage(small, 0, 0, pad.width, pad.height);
      classify(example.pixels);
    });
  });
  clear();
  if (examples.length) document.querySelector("#examples button").click();
})();
