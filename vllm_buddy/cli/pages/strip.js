// Draws which layers each token ran: a column per token, the last layer on top, a gap where the prompt ends.
const STRIP = {least: 3, most: 9, high: 4, gap: 1};

// paths: as in a response, {layers: [[layer, ...], ...], runs: [[tokens, index in layers], ...]}.
function drawStrip(box, paths, numLayers, numPrompt) {
  const tokens = paths.runs.reduce((sum, [n]) => sum + n, 0);
  const canvas = box.querySelector('canvas') || box.appendChild(document.createElement('canvas'));
  const style = getComputedStyle(document.documentElement), scale = window.devicePixelRatio || 1;
  const split = 5;
  const wide = Math.max(STRIP.least, Math.min(STRIP.most, Math.floor((box.clientWidth - split) / Math.max(tokens, 1))));
  const width = tokens * wide + split, height = numLayers * STRIP.high;
  canvas.width = width * scale; canvas.height = height * scale;
  canvas.style.width = width + 'px'; canvas.style.height = height + 'px';
  const context = canvas.getContext('2d');
  context.scale(scale, scale);
  const colours = [style.getPropertyValue('--skip').trim(), style.getPropertyValue('--run').trim()];
  let token = 0, executed = 0;
  const gap = wide > 5 ? STRIP.gap : 0;
  for (const [count, index] of paths.runs) {
    const ran = new Set(paths.layers[index]);
    executed += count * ran.size;
    for (let i = 0; i < count; i++, token++) {
      const left = token * wide + (token >= numPrompt ? split : 0);
      for (let layer = 0; layer < numLayers; layer++) {
        context.fillStyle = colours[ran.has(layer) ? 1 : 0];
        context.fillRect(left, (numLayers - 1 - layer) * STRIP.high, wide - gap, STRIP.high - STRIP.gap);
      }
    }
  }
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label',
    `${tokens} tokens, of which ${numPrompt} in the prompt, ran ${(executed / Math.max(tokens, 1)).toFixed(1)} of ` +
    `${numLayers} layers on average, on ${paths.layers.length} path${paths.layers.length === 1 ? '' : 's'}`);
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function bar(value, most, words, kind = '') {
  const filled = element('i', {class: kind});
  filled.style.width = `${Math.round(60 * value / most)}%`;
  return element('div', {class: 'bar'}, filled, words);
}
