// The events of a load or a reply: magistral_mlx/serving/bridge_events.schema.json in Swift.
// A test of the Python package compares every name and type here with that schema.

/// One event of a stream.
public enum MagistralEvent: Codable, Sendable, Equatable {
    case progress(Progress)
    case ready(Ready)
    case reasoning(Reasoning)
    case answer(Answer)
    case toolCall(Called)
    case done(Done)
    case error(Failed)

    enum Kind: String, Codable {
        case progress
        case ready
        case reasoning
        case answer
        case toolCall = "tool_call"
        case done
        case error
    }

    enum CodingKeys: String, CodingKey {
        case kind
    }

    public init(from decoder: Decoder) throws {
        switch try decoder.container(keyedBy: CodingKeys.self).decode(Kind.self, forKey: .kind) {
        case .progress: self = .progress(try Progress(from: decoder))
        case .ready: self = .ready(try Ready(from: decoder))
        case .reasoning: self = .reasoning(try Reasoning(from: decoder))
        case .answer: self = .answer(try Answer(from: decoder))
        case .toolCall: self = .toolCall(try Called(from: decoder))
        case .done: self = .done(try Done(from: decoder))
        case .error: self = .error(try Failed(from: decoder))
        }
    }

    public func encode(to encoder: Encoder) throws {
        var container = encoder.container(keyedBy: CodingKeys.self)
        switch self {
        case .progress(let event):
            try container.encode(Kind.progress, forKey: .kind)
            try event.encode(to: encoder)
        case .ready(let event):
            try container.encode(Kind.ready, forKey: .kind)
            try event.encode(to: encoder)
        case .reasoning(let event):
            try container.encode(Kind.reasoning, forKey: .kind)
            try event.encode(to: encoder)
        case .answer(let event):
            try container.encode(Kind.answer, forKey: .kind)
            try event.encode(to: encoder)
        case .toolCall(let event):
            try container.encode(Kind.toolCall, forKey: .kind)
            try event.encode(to: encoder)
        case .done(let event):
            try container.encode(Kind.done, forKey: .kind)
            try event.encode(to: encoder)
        case .error(let event):
            try container.encode(Kind.error, forKey: .kind)
            try event.encode(to: encoder)
        }
    }

    /// True for the last event of a stream.
    public var isLast: Bool {
        switch self {
        case .ready, .done, .error: true
        case .progress, .reasoning, .answer, .toolCall: false
        }
    }
}

/// How far the model is loaded (bytes), or the prompt read (tokens).
public struct Progress: Codable, Sendable, Equatable {
    public let phase: Phase
    public let done: Int
    public let total: Int
}

public enum Phase: String, Codable, Sendable {
    case load
    case prompt
}

/// The model is loaded.
public struct Ready: Codable, Sendable, Equatable {
    public let model: String
    public let context: Int
    public let kvBits: Int?
    public let weightsBytes: Int
    public let totalBytes: Int
    public let budgetBytes: Int

    enum CodingKeys: String, CodingKey {
        case model
        case context
        case kvBits = "kv_bits"
        case weightsBytes = "weights_bytes"
        case totalBytes = "total_bytes"
        case budgetBytes = "budget_bytes"
    }
}

/// The next piece of the trace.
public struct Reasoning: Codable, Sendable, Equatable {
    public let text: String
}

/// The next piece of the answer.
public struct Answer: Codable, Sendable, Equatable {
    public let text: String
}

/// A function that the model asks to be called; `arguments` is the text of a JSON object.
public struct Called: Codable, Sendable, Equatable {
    public let id: String
    public let name: String
    public let arguments: String
}

/// The reply has ended.
public struct Done: Codable, Sendable, Equatable {
    public let finishReason: FinishReason
    public let reasoningClosedBy: ClosedBy?
    public let usage: Usage

    enum CodingKeys: String, CodingKey {
        case finishReason = "finish_reason"
        case reasoningClosedBy = "reasoning_closed_by"
        case usage
    }
}

public enum FinishReason: String, Codable, Sendable {
    case stop
    case length
    case toolCalls = "tool_calls"
    case loop
    case cancelled
}

public enum ClosedBy: String, Codable, Sendable {
    case model
    case budget
    case loop
}

/// The cost of a reply.
public struct Usage: Codable, Sendable, Equatable {
    public let promptTokens: Int
    public let completionTokens: Int
    public let reasoningTokens: Int
    public let cachedTokens: Int
    public let forwardPasses: Int
    public let prefillSeconds: Double
    public let decodeSeconds: Double
    public let peakMemoryBytes: Int
    public let maxTokens: Int
    public let seed: Int

    enum CodingKeys: String, CodingKey {
        case promptTokens = "prompt_tokens"
        case completionTokens = "completion_tokens"
        case reasoningTokens = "reasoning_tokens"
        case cachedTokens = "cached_tokens"
        case forwardPasses = "forward_passes"
        case prefillSeconds = "prefill_seconds"
        case decodeSeconds = "decode_seconds"
        case peakMemoryBytes = "peak_memory_bytes"
        case maxTokens = "max_tokens"
        case seed
    }
}

/// A failure, and what to do about it.
public struct Failed: Codable, Sendable, Equatable, Error {
    public let code: String
    public let message: String
    public let whatToDo: String

    enum CodingKeys: String, CodingKey {
        case code
        case message
        case whatToDo = "what_to_do"
    }
}
