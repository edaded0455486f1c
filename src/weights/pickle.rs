//! Reads the pickle inside a file written by `torch.save`, as data.
//!
//! A pickle is a program for a stack machine that can call any function. This reader knows only the instructions that a dictionary of
//! tensors is made of, and only the callables named in [`Global`], which it does not call either: it records what they would have
//! made. Anything else is an error that names it.
//!
//! Objects live in one arena and are referred to by number, so that reading a memo entry a thousand times copies nothing, however
//! deeply it nests; numbers, depth and total size are limited. There is no recursion.

use std::collections::HashMap;

/// Largest pickle: that of a model with 100 000 tensors takes 20 MB.
const MAX_BYTES: usize = 64 << 20;
/// Most nested containers, and most open marks.
const MAX_DEPTH: u32 = 64;
/// Most memo entries.
const MAX_MEMO: usize = 1 << 20;
/// Most objects, and most entries of all containers together.
const MAX_ELEMENTS: usize = 10_000_000;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;

/// Why a pickle was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// It ends in the middle of an instruction, or without STOP.
    #[error("the pickle is cut short")]
    Truncated,
    /// An instruction that a dictionary of tensors does not need.
    #[error("the pickle has instruction 0x{opcode:02x} at byte {at}, which no dictionary of tensors needs: refused")]
    Opcode {
        /// The instruction.
        opcode: u8,
        /// Where it is.
        at: usize,
    },
    /// A callable or class outside the allowed ones.
    #[error("the pickle asks for `{0}`, which is no part of a tensor: refused, nothing in it was run")]
    Global(String),
    /// A size that no real file reaches.
    #[error("the pickle has {0}: refused")]
    Limit(&'static str),
    /// Instructions that do not fit together.
    #[error("the pickle is malformed at byte {at}: {problem}")]
    Malformed {
        /// What is wrong.
        problem: &'static str,
        /// Where it was noticed.
        at: usize,
    },
}

/// A tensor of a pickle: a view into one of the storages that lie beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PickledTensor {
    /// Which storage: the name of its entry in the archive.
    pub storage: String,
    /// Number format of the storage.
    pub dtype: StorageType,
    /// Elements of the storage.
    pub storage_len: usize,
    /// First element in the storage.
    pub offset: usize,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Distance between neighbours in each dimension, in elements.
    pub strides: Vec<usize>,
}

/// Number formats of storages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "torch's own names")]
pub enum StorageType {
    Double,
    Float,
    Half,
    BFloat16,
    Long,
    Int,
    Short,
    Char,
    Byte,
    Bool,
}

impl StorageType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Double | Self::Long => 8,
            Self::Float | Self::Int => 4,
            Self::Half | Self::BFloat16 | Self::Short => 2,
            Self::Char | Self::Byte | Self::Bool => 1,
        }
    }

    fn from_class(name: &str) -> Option<Self> {
        Some(match name {
            "DoubleStorage" => Self::Double,
            "FloatStorage" => Self::Float,
            "HalfStorage" => Self::Half,
            "BFloat16Storage" => Self::BFloat16,
            "LongStorage" => Self::Long,
            "IntStorage" => Self::Int,
            "ShortStorage" => Self::Short,
            "CharStorage" => Self::Char,
            "ByteStorage" => Self::Byte,
            "BoolStorage" => Self::Bool,
            _ => return None,
        })
    }
}

/// The only classes and functions that may be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`
    RebuildParameter,
    /// `torch.FloatStorage` and its like
    Storage(StorageType),
}

impl Global {
    fn find(module: &str, name: &str) -> Result<Self, PickleError> {
        match (module, name) {
            ("collections", "OrderedDict") => return Ok(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => return Ok(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => return Ok(Self::RebuildParameter),
            ("torch", class) => {
                if let Some(storage) = StorageType::from_class(class) {
                    return Ok(Self::Storage(storage));
                }
            }
            _ => {}
        }
        let name: String = format!("{module}.{name}").chars().take(80).collect();
        Err(PickleError::Global(name.escape_debug().to_string()))
    }
}

/// Number of an object in the arena.
type Id = u32;

/// An object on the stack of the machine.
#[derive(Debug)]
enum Object {
    /// None, a truth value, a float: something that only has to be passed over.
    Opaque,
    Int(i64),
    Str(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// A storage: class, key, elements.
    Storage(StorageType, String, usize),
    Tensor(Box<PickledTensor>),
}

/// The tensors of the dictionary that `pickle` makes, in its order. Values that are not tensors are passed over.
///
/// # Errors
/// [`PickleError`] if it is anything else than a dictionary of tensors.
pub fn state_dict(pickle: &[u8]) -> Result<Vec<(String, PickledTensor)>, PickleError> {
    if pickle.len() > MAX_BYTES {
        return Err(PickleError::Limit("more than 64 MiB"));
    }
    let mut machine = Machine { bytes: pickle, ..Machine::default() };
    let top = machine.run()?;
    let Object::Dict(pairs) = machine.object(top) else { return Err(machine.malformed("it is not a dictionary")) };
    let mut tensors = Vec::new();
    for (key, value) in pairs {
        if let (Object::Str(name), Object::Tensor(tensor)) = (machine.object(*key), machine.object(*value)) {
            tensors.push((name.clone(), (**tensor).clone()));
        }
    }
    Ok(tensors)
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    /// Next byte.
    at: usize,
    objects: Vec<Object>,
    /// How deeply each object nests.
    depths: Vec<u32>,
    /// Entries of all containers.
    n_entries: usize,
    stack: Vec<Id>,
    /// Heights of the stack at the marks that are open.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Machine<'_> {
    /// Runs to STOP and returns what is on top of the stack then.
    fn run(&mut self) -> Result<Id, PickleError> {
        loop {
            let at = self.at;
            let opcode = self.u8()?;
            match opcode {
                b'.' => return self.pop(),
                // PROTO, and FRAME, which only helps to read ahead
                0x80 => _ = self.u8()?,
                0x95 => _ = self.take(8)?,
                // POP, POP_MARK, MARK
                b'0' => _ = self.pop()?,
                b'1' => _ = self.pop_to_mark()?,
                b'(' => {
                    if self.marks.len() >= MAX_DEPTH as usize {
                        return Err(PickleError::Limit("more than 64 levels"));
                    }
                    self.marks.push(self.stack.len());
                }
                // NONE, NEWTRUE, NEWFALSE, BINFLOAT
                b'N' | 0x88 | 0x89 => self.push(Object::Opaque)?,
                b'G' => {
                    self.take(8)?;
                    self.push(Object::Opaque)?;
                }
                // BININT, BININT1, BININT2, LONG1
                b'J' => {
                    let n = i32::from_le_bytes(self.array()?);
                    self.push(Object::Int(n.into()))?;
                }
                b'K' => {
                    let n = self.u8()?;
                    self.push(Object::Int(n.into()))?;
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.array()?);
                    self.push(Object::Int(n.into()))?;
                }
                0x8a => {
                    let n = self.long1()?;
                    self.push(Object::Int(n))?;
                }
                // BINUNICODE, SHORT_BINUNICODE, and SHORT_BINSTRING of Python 2
                b'X' => {
                    let n = u32::from_le_bytes(self.array()?) as usize;
                    self.string(n)?;
                }
                0x8c | b'U' => {
                    let n = self.u8()?.into();
                    self.string(n)?;
                }
                // EMPTY_TUPLE, TUPLE, TUPLE1, TUPLE2, TUPLE3
                b')' => self.push(Object::Tuple(Vec::new()))?,
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.tuple(items)?;
                }
                0x85..=0x87 => {
                    let n = usize::from(opcode - 0x84);
                    let start = self.stack.len().checked_sub(n).filter(|start| *start >= self.floor());
                    let items = self.stack.split_off(start.ok_or_else(|| self.malformed("the stack is too short"))?);
                    self.tuple(items)?;
                }
                // EMPTY_LIST, APPEND, APPENDS
                b']' => self.push(Object::List(Vec::new()))?,
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
                }
                // EMPTY_DICT, SETITEM, SETITEMS
                b'}' => self.push(Object::Dict(Vec::new()))?,
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set(&[key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set(&items)?;
                }
                // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
                b'q' => {
                    let slot = self.u8()?.into();
                    self.memoize(slot)?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.memoize(slot)?;
                }
                0x94 => self.memoize(self.memo.len() as u32)?,
                b'h' => {
                    let slot = self.u8()?.into();
                    self.recall(slot)?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.recall(slot)?;
                }
                // GLOBAL, STACK_GLOBAL
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Object::Global(Global::find(&module, &name)?))?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Object::Str(module), Object::Str(name)) = (self.object(module), self.object(name)) else {
                        return Err(self.malformed("a name is not a string"));
                    };
                    let global = Global::find(module, name)?;
                    self.push(Object::Global(global))?;
                }
                // BINPERSID, REDUCE, BUILD
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                b'b' => {
                    // Sets attributes; of a state dictionary that is `_metadata`, which no tensor depends on.
                    self.pop()?;
                    let target = self.top()?;
                    if !matches!(self.object(target), Object::Dict(_)) {
                        return Err(self.malformed("attributes of something else than a dictionary"));
                    }
                }
                opcode => return Err(PickleError::Opcode { opcode, at }),
            }
        }
    }

    /// What a persistent id stands for: `("storage", class, key, device, number of elements)`.
    fn storage(&mut self) -> Result<(), PickleError> {
        let id = self.pop()?;
        let storage = match self.tuple_of(id) {
            Some([tag, class, key, device, len]) => match (self.object(*class), self.object(*key), self.object(*len)) {
                (Object::Global(Global::Storage(class)), Object::Str(key), Object::Int(len)) if self.is_str(*tag, "storage") => {
                    let device_is_named = matches!(self.object(*device), Object::Str(_));
                    usize::try_from(*len).ok().filter(|_| device_is_named).map(|len| Object::Storage(*class, key.clone(), len))
                }
                _ => None,
            },
            _ => None,
        };
        let storage = storage.ok_or_else(|| self.malformed("a persistent id that is no storage"))?;
        self.push(storage)
    }

    /// What calling the allowed function below the arguments on the stack would make.
    fn reduce(&mut self) -> Result<(), PickleError> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let Object::Global(callable) = *self.object(callable) else {
            return Err(self.malformed("a call of something not callable"));
        };
        let arguments = self.tuple_of(arguments).ok_or_else(|| self.malformed("arguments that are no tuple"))?;
        match (callable, arguments) {
            (Global::OrderedDict, []) => self.push(Object::Dict(Vec::new())),
            (Global::RebuildTensor, [storage, offset, shape, strides, _requires_grad, _hooks, ..]) => {
                let tensor = self.tensor(*storage, *offset, *shape, *strides);
                let tensor = tensor.ok_or_else(|| self.malformed("a tensor with impossible arguments"))?;
                self.push(Object::Tensor(Box::new(tensor)))
            }
            (Global::RebuildParameter, [tensor, _requires_grad, _hooks]) => {
                let tensor = *tensor;
                self.push_id(tensor)
            }
            _ => Err(self.malformed("a call with other arguments than torch writes")),
        }
    }

    fn tensor(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Option<PickledTensor> {
        let Object::Storage(dtype, key, storage_len) = self.object(storage) else { return None };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        let tensor = PickledTensor {
            storage: key.clone(),
            dtype: *dtype,
            storage_len: *storage_len,
            offset: self.size(offset)?,
            shape,
            strides,
        };
        tensor.is_inside().then_some(tensor)
    }

    fn size(&self, id: Id) -> Option<usize> {
        match self.object(id) {
            Object::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        self.tuple_of(id).filter(|items| items.len() <= MAX_DIMS)?.iter().map(|item| self.size(*item)).collect()
    }

    fn tuple_of(&self, id: Id) -> Option<&[Id]> {
        match self.object(id) {
            Object::Tuple(items) => Some(items),
            _ => None,
        }
    }

    fn is_str(&self, id: Id, expected: &str) -> bool {
        matches!(self.object(id), Object::Str(s) if s == expected)
    }

    fn tuple(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        let depth = self.grow(&items, 0)?;
        self.push(Object::Tuple(items))?;
        if let Some(last) = self.depths.last_mut() {
            *last = depth;
        }
        Ok(())
    }

    fn append(&mut self, items: Vec<Id>) -> Result<(), PickleError> {
        let list = self.top()?;
        let depth = self.grow(&items, self.depths[list as usize])?;
        self.depths[list as usize] = depth;
        match &mut self.objects[list as usize] {
            Object::List(list) => list.extend(items),
            _ => return Err(self.malformed("an item for something else than a list")),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<(), PickleError> {
        if !items.len().is_multiple_of(2) {
            return Err(self.malformed("a key without a value"));
        }
        let dict = self.top()?;
        let depth = self.grow(items, self.depths[dict as usize])?;
        self.depths[dict as usize] = depth;
        match &mut self.objects[dict as usize] {
            Object::Dict(pairs) => pairs.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            _ => return Err(self.malformed("an item for something else than a dictionary")),
        }
        Ok(())
    }

    /// Counts `items` as entries of a container that was `depth` deep, and returns how deep it is with them.
    fn grow(&mut self, items: &[Id], depth: u32) -> Result<u32, PickleError> {
        self.n_entries += items.len();
        if self.n_entries > MAX_ELEMENTS {
            return Err(PickleError::Limit("more than 10 million elements"));
        }
        let depth = items.iter().map(|item| self.depths[*item as usize] + 1).max().unwrap_or(0).max(depth);
        if depth > MAX_DEPTH { Err(PickleError::Limit("more than 64 levels")) } else { Ok(depth) }
    }

    fn memoize(&mut self, slot: u32) -> Result<(), PickleError> {
        let top = self.top()?;
        if self.memo.len() >= MAX_MEMO {
            return Err(PickleError::Limit("more than a million memo entries"));
        }
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<(), PickleError> {
        let id = *self.memo.get(&slot).ok_or_else(|| self.malformed("a memo entry that was never made"))?;
        self.push_id(id)
    }

    fn push(&mut self, object: Object) -> Result<(), PickleError> {
        if self.objects.len() >= MAX_ELEMENTS {
            return Err(PickleError::Limit("more than 10 million elements"));
        }
        self.objects.push(object);
        self.depths.push(0);
        self.push_id(self.objects.len() as Id - 1)
    }

    fn push_id(&mut self, id: Id) -> Result<(), PickleError> {
        if self.stack.len() >= MAX_ELEMENTS {
            return Err(PickleError::Limit("more than 10 million elements"));
        }
        self.stack.push(id);
        Ok(())
    }

    /// Height that the stack may not fall below: what is under the last mark belongs to an outer container.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    fn top(&self) -> Result<Id, PickleError> {
        match self.stack.last() {
            Some(id) if self.stack.len() > self.floor() => Ok(*id),
            _ => Err(self.malformed("the stack is empty")),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().ok_or_else(|| self.malformed("no mark is open"))?;
        Ok(self.stack.split_off(mark))
    }

    fn object(&self, id: Id) -> &Object {
        &self.objects[id as usize]
    }

    fn malformed(&self, problem: &'static str) -> PickleError {
        PickleError::Malformed { problem, at: self.at }
    }

    fn take(&mut self, n: usize) -> Result<&[u8], PickleError> {
        let bytes = self.bytes[self.at..].get(..n).ok_or(PickleError::Truncated)?;
        self.at += n;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8, PickleError> {
        Ok(self.array::<1>()?[0])
    }

    /// A little-endian two's complement integer of as many bytes as its first byte says.
    fn long1(&mut self) -> Result<i64, PickleError> {
        let n = usize::from(self.u8()?);
        if n > 8 {
            return Err(self.malformed("an integer of more than 64 bits"));
        }
        let bytes = self.take(n)?;
        let mut wide = [if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 }; 8];
        wide[..n].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(wide))
    }

    fn string(&mut self, n: usize) -> Result<(), PickleError> {
        let text = std::str::from_utf8(self.take(n)?).map(str::to_owned);
        let text = text.map_err(|_| self.malformed("text that is not UTF-8"))?;
        self.push(Object::Str(text))
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let rest = &self.bytes[self.at..];
        let n = rest.iter().position(|b| *b == b'\n').ok_or(PickleError::Truncated)?;
        let line = std::str::from_utf8(&rest[..n]).map(str::to_owned);
        self.at += n + 1;
        line.map_err(|_| self.malformed("a name that is not UTF-8"))
    }
}

impl PickledTensor {
    /// Number of elements; `None` if that overflows.
    pub fn n_elements(&self) -> Option<usize> {
        crate::tensor::checked_len(&self.shape)
    }

    /// Whether the strides are those of a row-major array. A dimension of one element may have any.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1usize;
        self.shape.iter().zip(&self.strides).rev().all(|(&n, &stride)| {
            let fits = n == 1 || stride == expected;
            expected = expected.saturating_mul(n);
            fits
        })
    }

    /// Whether each of its elements lies in its storage, and there are no more of them: with strides of 0, as `expand` makes them, a
    /// file of a few bytes could ask for terabytes.
    fn is_inside(&self) -> bool {
        let Some(len) = self.n_elements().filter(|_| self.shape.len() == self.strides.len()) else { return false };
        if len == 0 {
            return self.offset <= self.storage_len;
        }
        let last = self
            .shape
            .iter()
            .zip(&self.strides)
            .try_fold(self.offset, |at, (n, stride)| at.checked_add((n - 1).checked_mul(*stride)?));
        len <= self.storage_len && last.is_some_and(|last| last < self.storage_len)
    }
}
